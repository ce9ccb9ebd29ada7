//! The encoding of the manifest, which lists the segments and the synced length of each. Pure.
//!
//! ```text
//! file     slot | zeros | slot | zeros | list | zeros | list | zeros
//! slot     magic (8) | version u32 | salt u64 | turn u64 | witness | crc u32
//! list     magic (8) | version u32 | salt u64 | generation u64 | room u64 | closed u32 | count u32 |
//!          witnesses | crc u32
//! witness  segment u64 | end u64 | messages u64
//! ```
//!
//! Slots begin at offsets 0 and 4096. Lists begin at 8192 and `room` bytes after that; `room` is a
//! multiple of 4096. Turn and generation are counters. Their lowest bit selects which of the two
//! slots or lists is written, so that a write torn by a crash leaves the other one intact.
//!
//! A list is written and synced when a segment is begun, closed or removed. All its segments are
//! closed, except the last unless `closed` is 1. A slot describes the current segment. It is
//! written after each sync of the segment but is not synced itself: after a power cut an older slot
//! may remain.
//!
//! All numbers are little-endian; checksums are CRC-32C, as in segments. An unknown number of
//! messages is encoded as 2⁶⁴ − 1.

use crc32c::crc32c;

const SLOT_MAGIC: &[u8; 8] = b"peerbusS";
const LIST_MAGIC: &[u8; 8] = b"peerbusL";
/// The format version that this crate reads and writes.
const VERSION: u32 = 1;
/// The alignment of slots and lists in bytes, so that no disk block holds parts of two.
const PAGE: u64 = 4096;
const LISTS: u64 = 2 * PAGE;
const SLOT: usize = 56;
/// The size of a list before its witnesses, and the size of a witness, in bytes.
const LIST: usize = 44;
const WITNESS: usize = 24;
const CRC: usize = 4;
const UNKNOWN: u64 = u64::MAX;

/// The known content of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Witness {
    pub(super) segment: u64,
    /// The offset up to which the segment was synced.
    pub(super) end: u64,
    /// The number of messages before `end`; `None` if unknown.
    pub(super) messages: Option<u64>,
    /// Bytes after `end` are ignored.
    pub(super) closed: bool,
}

impl Witness {
    fn encode(&self, buf: &mut Vec<u8>) {
        for number in [self.segment, self.end, self.messages.unwrap_or(UNKNOWN)] {
            buf.extend_from_slice(&number.to_le_bytes());
        }
    }

    fn decode(bytes: &[u8], closed: bool) -> Self {
        let messages = Some(u64_at(bytes, 16)).filter(|messages| *messages != UNKNOWN);
        Self { segment: u64_at(bytes, 0), end: u64_at(bytes, 8), messages, closed }
    }
}

/// The synced state of the current segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Slot {
    pub(super) salt: u64,
    pub(super) turn: u64,
    pub(super) witness: Witness,
}

impl Slot {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = SLOT_MAGIC.to_vec();
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&self.salt.to_le_bytes());
        bytes.extend_from_slice(&self.turn.to_le_bytes());
        self.witness.encode(&mut bytes);
        with_crc(bytes)
    }

    /// The offset in the file.
    pub(super) fn place(&self) -> u64 {
        self.turn % 2 * PAGE
    }

    fn decode(bytes: &[u8], salt: u64) -> Option<Self> {
        let bytes = checked(bytes.get(..SLOT)?)?;
        let is_ours = bytes.starts_with(SLOT_MAGIC) && u64_at(bytes, 12) == salt;
        (is_ours && u32_at(bytes, 8) == VERSION).then(|| {
            let witness = Witness::decode(&bytes[28..], false);
            Self { salt, turn: u64_at(bytes, 20), witness }
        })
    }
}

/// The list of segments, in ascending order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct List {
    pub(super) salt: u64,
    pub(super) generation: u64,
    /// The space reserved for the list, in bytes.
    pub(super) room: u64,
    pub(super) segments: Vec<Witness>,
}

impl List {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = LIST_MAGIC.to_vec();
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        for number in [self.salt, self.generation, self.room] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        let closed = self.segments.last().is_some_and(|last| last.closed);
        bytes.extend_from_slice(&u32::from(closed).to_le_bytes());
        bytes.extend_from_slice(&(self.segments.len() as u32).to_le_bytes());
        self.segments.iter().for_each(|segment| segment.encode(&mut bytes));
        with_crc(bytes)
    }

    /// The offset in the file.
    pub(super) fn place(&self) -> u64 {
        LISTS + self.generation % 2 * self.room
    }

    pub(super) fn fits(&self) -> bool {
        self.size() <= self.room
    }

    fn size(&self) -> u64 {
        (LIST + WITNESS * self.segments.len() + CRC) as u64
    }

    /// Sets `room` to twice the list's size, rounded up to 8 KiB.
    pub(super) fn make_room(&mut self) {
        self.room = (2 * self.size()).next_multiple_of(2 * PAGE);
    }

    /// Encodes a complete file that holds this list.
    pub(super) fn file(&self) -> Vec<u8> {
        let mut bytes = vec![0; (LISTS + 2 * self.room) as usize];
        let list = self.encode();
        bytes[self.place() as usize..][..list.len()].copy_from_slice(&list);
        bytes
    }

    fn decode(bytes: &[u8]) -> Result<Option<Self>, u32> {
        let Some(head) = bytes.get(..LIST).filter(|head| head.starts_with(LIST_MAGIC)) else {
            return Ok(None);
        };
        let count = u32_at(head, 40) as usize;
        let size = count.checked_mul(WITNESS).and_then(|size| size.checked_add(LIST + CRC));
        let Some(bytes) = size.and_then(|size| bytes.get(..size)).and_then(checked) else {
            return Ok(None);
        };
        match u32_at(head, 8) {
            VERSION => {}
            version => return Err(version),
        }
        let last_is_closed = u32_at(head, 36) == 1;
        let segments = bytes[LIST..].chunks_exact(WITNESS).enumerate();
        let segments: Vec<_> = segments
            .map(|(at, bytes)| Witness::decode(bytes, at + 1 < count || last_is_closed))
            .collect();
        let (salt, generation, room) = (u64_at(head, 12), u64_at(head, 20), u64_at(head, 28));
        let in_order = segments.is_sorted_by(|one, next| one.segment < next.segment);
        let is_list = in_order && room % PAGE == 0;
        Ok(is_list.then_some(Self { salt, generation, room, segments }))
    }
}

/// A decoded manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Manifest {
    pub(super) list: List,
    /// The newer of the two slots.
    pub(super) slot: Option<Slot>,
    /// The file matches the list's layout: the next list can be written in place.
    pub(super) is_whole: bool,
}

impl Manifest {
    /// Decodes a file; returns `None` if it holds no valid list.
    ///
    /// # Errors
    /// The format version, if this crate does not know it.
    pub(super) fn decode(bytes: &[u8]) -> Result<Option<Self>, u32> {
        let mut newest: Option<(u64, List)> = None;
        // The first list holds the second list's offset, but may be the torn one: each page is
        // tried.
        for place in (LISTS..bytes.len() as u64).step_by(PAGE as usize) {
            if let Some(list) = List::decode(&bytes[place as usize..])?
                && newest.as_ref().is_none_or(|(_, newest)| list.generation > newest.generation)
            {
                newest = Some((place, list));
            }
        }
        let Some((place, list)) = newest else { return Ok(None) };
        let slots = [0, PAGE]
            .into_iter()
            .filter_map(|place| Slot::decode(bytes.get(place as usize..)?, list.salt));
        let slot = slots.max_by_key(|slot| slot.turn);
        let is_whole = place == list.place() && bytes.len() as u64 == LISTS + 2 * list.room;
        Ok(Some(Self { list, slot, is_whole }))
    }

    /// The last segment number in the list; an older segment that is not listed was removed.
    pub(super) fn newest(&self) -> u64 {
        self.list.segments.last().map_or(0, |last| last.segment)
    }

    /// The witnesses of all segments, from the list and the slot.
    pub(super) fn witnesses(&self) -> Vec<Witness> {
        let mut all = self.list.segments.clone();
        if let Some(Slot { witness, .. }) = self.slot {
            match all.binary_search_by_key(&witness.segment, |it| it.segment) {
                Ok(at) if witness.end > all[at].end => all[at] = witness,
                // The list with this segment was lost.
                Err(at) if at == all.len() => all.push(witness),
                Ok(_) | Err(_) => {}
            }
        }
        all
    }
}

fn with_crc(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.extend_from_slice(&crc32c(&bytes).to_le_bytes());
    bytes
}

/// Returns the bytes before the trailing checksum, if it matches.
fn checked(bytes: &[u8]) -> Option<&[u8]> {
    let (bytes, crc) = bytes.split_at_checked(bytes.len().checked_sub(CRC)?)?;
    (u32_at(crc, 0) == crc32c(bytes)).then_some(bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn list(generation: u64, segments: u64) -> List {
        let witness = |segment| Witness {
            segment,
            end: 100 * segment,
            messages: (segment % 2 == 0).then_some(segment),
            closed: segment < segments,
        };
        let segments = (1..=segments).map(witness).collect();
        let mut list = List { salt: 7, generation, room: 0, segments };
        list.make_room();
        list
    }

    fn put(bytes: &mut [u8], place: u64, part: &[u8]) {
        bytes[place as usize..][..part.len()].copy_from_slice(part);
    }

    fn slot(turn: u64, segment: u64, end: u64) -> Slot {
        let witness = Witness { segment, end, messages: Some(turn), closed: false };
        Slot { salt: 7, turn, witness }
    }

    #[test]
    fn the_newest_list_and_the_newest_slot_count() {
        let (old, new) = (list(4, 3), list(5, 2));
        let mut bytes = old.file();
        put(&mut bytes, new.place(), &new.encode());
        for slot in [slot(8, 2, 700), slot(9, 2, 800)] {
            put(&mut bytes, slot.place(), &slot.encode());
        }
        let manifest = Manifest::decode(&bytes).unwrap().unwrap();
        assert_eq!((&manifest.list, manifest.slot), (&new, Some(slot(9, 2, 800))));
        assert!(manifest.is_whole);
        let witnesses = manifest.witnesses();
        assert_eq!(witnesses.len(), 2);
        assert_eq!(witnesses[1], slot(9, 2, 800).witness);
    }

    #[test]
    fn a_torn_list_or_slot_leaves_the_other_one() {
        let (old, new) = (list(4, 3), list(5, 400));
        let mut whole = List { room: new.room, ..old.clone() }.file();
        let old = List { room: new.room, ..old };
        put(&mut whole, new.place(), &new.encode());
        for slot in [slot(8, 3, 700), slot(9, 3, 800)] {
            put(&mut whole, slot.place(), &slot.encode());
        }
        let newest = slot(9, 3, 800);
        for at in (0..new.encode().len()).step_by(7) {
            let mut bytes = whole.clone();
            bytes[new.place() as usize + at] ^= 4;
            bytes[newest.place() as usize + at % SLOT] ^= 4;
            let manifest = Manifest::decode(&bytes).unwrap().unwrap();
            assert_eq!((manifest.list, manifest.slot), (old.clone(), Some(slot(8, 3, 700))));
        }
    }

    #[test]
    fn a_slot_tells_of_a_segment_that_is_newer_than_the_list_and_of_none_that_was_removed() {
        let mut list = list(4, 5);
        list.segments.remove(1);
        let told = |slot| Manifest { list: list.clone(), slot: Some(slot), is_whole: true };
        assert_eq!(told(slot(1, 2, 9000)).witnesses(), list.segments);
        assert_eq!(told(slot(1, 5, 1)).witnesses(), list.segments);
        assert_eq!(told(slot(1, 6, 90)).witnesses()[4], slot(1, 6, 90).witness);
    }

    #[test]
    fn a_newer_version_is_told() {
        let mut encoded = list(4, 3).encode();
        encoded[8] = 2;
        encoded.truncate(encoded.len() - CRC);
        let mut bytes = vec![0; 3 * PAGE as usize];
        put(&mut bytes, LISTS, &with_crc(encoded));
        assert_eq!(Manifest::decode(&bytes), Err(2));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(
            bytes in prop::collection::vec(any::<u8>(), 0..200),
            at in 0..12_000_u64,
        ) {
            let mut file = list(4, 3).file();
            let end = file.len().min(at as usize + bytes.len());
            file[at as usize..end].copy_from_slice(&bytes[..end - at as usize]);
            let _any = Manifest::decode(&file);
        }
    }
}
