//! Reads a journal back: valid entries are passed on, damage is reported, nothing is changed.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;

use super::manifest::{Manifest, Witness};
use super::segment::{
    ENTRY, FRAME, Frame, HEADER, Header, HeaderError, MARK, WITH_MANIFEST, next_place,
};
use super::storage::{RESERVED, Storage};
use super::{Damage, Entry, JournalError, JournalFile, Position, Recovery};

/// The size of a read, in bytes.
const CHUNK: usize = 1024 * 1024;

/// The state from which a journal continues.
#[derive(Debug, Default)]
pub(super) struct Resume {
    pub(super) salt: Option<u64>,
    /// The highest segment number so far.
    pub(super) last: u64,
    /// The witnesses of the segments that exist, or should. All are closed.
    pub(super) listed: Vec<Witness>,
    /// The segments without an entry.
    pub(super) empty: BTreeSet<u64>,
    /// The manifest's last turn and generation, and the room of its lists: zero to write a new
    /// file.
    pub(super) turn: u64,
    pub(super) generation: u64,
    pub(super) room: u64,
}

/// Reads all segments, and passes on the entries in the order in which they were written.
///
/// The manifest lists the segments. A listed segment that does not exist is damaged as a whole. A
/// segment that is not listed was removed if it is older than the last in the list; if it is newer,
/// it was begun just before a crash. Bytes before the end that the manifest records for a segment
/// were stored: if they are invalid, they are damage.
///
/// Bytes after the end that the next segment names were never promised. In the last segment,
/// neither were invalid bytes after both the end that the manifest records and the last valid
/// record: they are the torn tail of a crash. Invalid bytes before a valid record count as damage.
/// They may belong to the write that the crash tore, whose blocks reach the disk in any order, but
/// the two cases look alike, and valid records are kept.
///
/// A journal of version 1 has no manifest. There, a segment that a later one names and that does
/// not exist is damage, and a damaged last record looks like a torn write.
pub(super) fn recover(
    storage: &dyn Storage,
    mut take: impl FnMut(Entry<'_>),
) -> Result<(Recovery, Resume), JournalError> {
    let mut recovery = Recovery::default();
    let there = storage.segments()?;
    let headers = read_headers(storage, &there)?;
    let file = storage.manifest()?;
    let salts: BTreeSet<u64> = headers.iter().flatten().map(|header| header.salt).collect();
    // A manifest of another journal is ignored.
    let manifest = decode_manifest(file.as_deref())?
        .filter(|manifest| salts.is_empty() || salts.contains(&manifest.list.salt));
    let has_version = |version| headers.iter().flatten().any(|header| header.version >= version);
    let is_wanted = file.is_some() || has_version(WITH_MANIFEST);
    if manifest.is_none() && is_wanted {
        let to = file.as_ref().map_or(0, |file| file.len() as u64);
        let (file, missing) = (JournalFile::Manifest, file.is_none());
        recovery.damaged.push(Damage { file, from: 0, to, missing });
        recovery.lost = None;
    }
    let first_salt = headers.iter().flatten().map(|header| header.salt).next();
    let salt = manifest.as_ref().map(|manifest| manifest.list.salt).or(first_salt);
    let newest = manifest.as_ref().map(Manifest::newest);
    let mut listed: BTreeMap<u64, Witness> = BTreeMap::new();
    for witness in manifest.iter().flat_map(Manifest::witnesses) {
        listed.insert(witness.segment, witness);
    }
    let seals: HashMap<u64, u64> =
        headers.iter().flatten().map(|header| (header.previous, header.previous_end)).collect();
    for witness in missing_segments(&there, &headers, &listed, newest, is_wanted) {
        let Witness { segment, end, messages, .. } = witness;
        let file = JournalFile::Segment(segment);
        recovery.damaged.push(Damage { file, from: 0, to: end, missing: true });
        recovery.lose(messages);
        listed.insert(segment, Witness { closed: true, ..witness });
    }
    let mut empty = BTreeSet::new();
    let counts = |number: &u64| listed.contains_key(number) || Some(*number) > newest;
    let counted: Vec<_> =
        there.iter().copied().zip(headers).filter(|(number, _)| counts(number)).collect();
    let last = counted.last().map(|(number, _)| *number);
    for (number, header) in counted {
        let witness = listed.get(&number).copied();
        let length = storage.length(number)?;
        let written = written(storage, number, length)?;
        // A segment whose header was never completed has at most the space for a first write.
        let was_begun = witness.is_some() || written > HEADER || length > RESERVED;
        let before = recovery.damaged.len();
        let Some(salt) = salt else {
            // No header is readable, so no record can be checked.
            if was_begun || Some(number) != last {
                let end = written.max(HEADER);
                recovery.damaged.push(Damage::part(number, 0, end));
                recovery.lose(None);
                let witness = Witness { segment: number, end, messages: None, closed: true };
                listed.insert(number, witness);
            }
            continue;
        };
        if header.is_none() && was_begun {
            recovery.damaged.push(Damage::part(number, 0, HEADER));
        }
        let counts_messages = header.is_some_and(|header| header.version >= WITH_MANIFEST);
        let header =
            header.unwrap_or(Header { version: 0, salt, number, previous: 0, previous_end: 0 });
        let closed = witness.filter(|witness| witness.closed).map(|witness| witness.end);
        let seal = seals.get(&number).copied().max(closed);
        let length = seal.unwrap_or(length).min(length);
        let segment = Segment { storage, header, length, written };
        let promised = match seal {
            Some(end) => end,
            // Without a later segment that names the end, a first scan finds it.
            None => segment.reached()?,
        };
        let known = witness.map_or(0, |witness| witness.end);
        let with_header = recovery.damaged.len();
        let read = segment.read(promised.max(known), known, &mut recovery, &mut take)?;
        if !seals.contains_key(&number) {
            recovery.torn += written.saturating_sub(read.end);
        }
        let is_damaged = recovery.damaged.len() > with_header;
        if is_damaged {
            // The manifest does not count messages after its recorded end.
            let counted = recovery.damaged[with_header..].iter().all(|it| it.to <= known);
            let messages = witness.and_then(|it| it.messages).filter(|_| counted);
            recovery.lose(messages.map(|messages| messages.saturating_sub(read.known_messages)));
        }
        let messages = match witness {
            Some(it) => it.messages.map(|it| it + read.messages - read.known_messages),
            None => (counts_messages && !is_damaged).then_some(read.messages),
        };
        if recovery.damaged.len() == before && read.entries == 0 {
            empty.insert(number);
        }
        if was_begun {
            let witness = Witness { segment: number, end: read.end, messages, closed: true };
            listed.insert(number, witness);
        }
        recovery.entries += read.entries;
        recovery.segments += 1;
    }
    let listed: Vec<_> = listed.into_values().collect();
    let last = there.last().copied().max(listed.last().map(|last| last.segment));
    let last = last.unwrap_or_default();
    let (turn, generation, room) = match &manifest {
        None => (0, 0, 0),
        Some(Manifest { list, slot, is_whole }) => {
            let turn = slot.map_or(0, |slot| slot.turn);
            (turn, list.generation, if *is_whole { list.room } else { 0 })
        }
    };
    Ok((recovery, Resume { salt, last, listed, empty, turn, generation, room }))
}

/// Returns the witnesses of segments that should exist but do not.
fn missing_segments(
    there: &[u64],
    headers: &[Option<Header>],
    listed: &BTreeMap<u64, Witness>,
    newest: Option<u64>,
    has_manifest: bool,
) -> Vec<Witness> {
    let is_missing = |segment: &u64| there.binary_search(segment).is_err();
    let told = listed.values().filter(|it| is_missing(&it.segment)).copied();
    // After the last segment in the manifest, none was removed. Without a manifest, segments were
    // removed from the oldest on: none is missing before the first that exists.
    let chained = headers.iter().flatten().filter(|header| match has_manifest {
        true => newest.is_some_and(|newest| header.previous > newest),
        false => Some(&header.number) != there.first(),
    });
    let chained = chained.filter(|header| is_missing(&header.previous)).map(|header| {
        let (segment, end) = (header.previous, header.previous_end);
        Witness { segment, end, messages: None, closed: true }
    });
    let chained = chained.filter(|it| !listed.contains_key(&it.segment));
    told.chain(chained).collect()
}

fn decode_manifest(file: Option<&[u8]>) -> Result<Option<Manifest>, JournalError> {
    match file {
        Some(bytes) => Manifest::decode(bytes).map_err(JournalError::Version),
        None => Ok(None),
    }
}

/// Returns the end of a segment's data, without the trailing zeros.
fn written(storage: &dyn Storage, number: u64, length: u64) -> io::Result<u64> {
    let (mut end, mut bytes) = (length, vec![0; CHUNK.min(length as usize)]);
    while end > 0 {
        let start = end.saturating_sub(CHUNK as u64);
        let part = &mut bytes[..(end - start) as usize];
        let read = storage.read(number, start, part)?;
        if let Some(last) = part[..read].iter().rposition(|byte| *byte != 0) {
            // A record may end with zeros of its own.
            return Ok(next_place(start + last as u64).min(length));
        }
        end = start;
    }
    Ok(0)
}

/// Refuses segments and manifests of an unknown format version.
pub(super) fn check_versions(storage: &dyn Storage) -> Result<(), JournalError> {
    read_headers(storage, &storage.segments()?)?;
    decode_manifest(storage.manifest()?.as_deref())?;
    Ok(())
}

fn read_headers(
    storage: &dyn Storage,
    numbers: &[u64],
) -> Result<Vec<Option<Header>>, JournalError> {
    let mut headers = Vec::with_capacity(numbers.len());
    for number in numbers.iter().copied() {
        let mut bytes = [0; HEADER as usize];
        let read = storage.read(number, 0, &mut bytes)?;
        headers.push(match Header::decode(&bytes[..read]) {
            Ok(header) => (header.number == number).then_some(header),
            Err(HeaderError::Version(version)) => return Err(JournalError::Version(version)),
            Err(HeaderError::Invalid) => None,
        });
    }
    Ok(headers)
}

struct Segment<'a> {
    storage: &'a dyn Storage,
    header: Header,
    /// The offset at which reading stops.
    length: u64,
    /// The offset after which there are only zeros.
    written: u64,
}

impl Segment<'_> {
    /// Returns the highest offset before which everything was written: that of a valid record, or
    /// that which a mark records as synced.
    fn reached(&self) -> io::Result<u64> {
        let mut reached = HEADER.min(self.length);
        self.scan(|position, found| {
            if let Some((frame, payload)) = found {
                reached = reached.max(position);
                if frame.kind() == MARK
                    && let Ok(mark) = payload.try_into()
                {
                    reached = reached.max(u64::from_le_bytes(mark).min(self.length));
                }
            }
            true
        })?;
        Ok(reached)
    }

    /// Passes on valid entries; invalid bytes before `promised` are damage. Messages before `known`
    /// are also counted separately.
    fn read(
        &self,
        promised: u64,
        known: u64,
        recovery: &mut Recovery,
        take: &mut impl FnMut(Entry<'_>),
    ) -> io::Result<Read> {
        let (number, mut gap) = (self.header.number, None);
        let mut read = Read { end: HEADER.min(self.length), ..Read::default() };
        self.scan(|position, found| {
            let Some((frame, payload)) = found else {
                gap.get_or_insert(position);
                return position < promised;
            };
            if let Some(from) = gap.take() {
                recovery.damaged.push(Damage::part(number, from, position));
            }
            if frame.kind() == ENTRY {
                read.count(position, frame, known);
                let position = Position { segment: number, offset: position, length: frame.length };
                take(Entry { position, payload });
            }
            read.end = position + frame.size();
            true
        })?;
        if read.end < promised {
            // The rest is invalid or truncated.
            let from = gap.unwrap_or(read.end);
            recovery.damaged.push(Damage::part(number, from, promised));
            read.end = promised;
        }
        Ok(read)
    }

    /// Scans the segment. `visit` gets each place with the frame and payload of its record, or with
    /// `None` where no valid record begins; the scan then continues at the next place. It ends when
    /// `visit` returns false.
    fn scan(&self, mut visit: impl FnMut(u64, Option<(Frame, &[u8])>) -> bool) -> io::Result<()> {
        let mut window = Window { segment: self, start: HEADER, bytes: Vec::new() };
        let mut position = HEADER;
        while position < self.written && position + FRAME <= self.length {
            let frame = self.header.decode_frame(position, window.get(position, FRAME)?);
            let fits = frame.filter(|frame| position + frame.size() <= self.length);
            let found = match fits {
                Some(frame) => {
                    let payload = frame.payload(window.get(position, frame.size())?);
                    payload.map(|payload| (frame, payload))
                }
                None => None,
            };
            let next = found.map_or(next_place(position), |(frame, _)| position + frame.size());
            if !visit(position, found) {
                return Ok(());
            }
            position = next;
        }
        Ok(())
    }
}

/// The outcome of reading a segment.
#[derive(Debug, Default)]
struct Read {
    /// The end of the last valid record, or of damage after it.
    end: u64,
    entries: u64,
    /// The number of messages in the entries.
    messages: u64,
    /// The number of those that the manifest counts too.
    known_messages: u64,
}

impl Read {
    fn count(&mut self, position: u64, frame: Frame, known: u64) {
        let messages = u64::from(frame.messages());
        self.entries += 1;
        self.messages += messages;
        if position < known {
            self.known_messages += messages;
        }
    }
}

/// The part of a segment held in memory.
struct Window<'a, 'b> {
    segment: &'a Segment<'b>,
    start: u64,
    bytes: Vec<u8>,
}

impl Window<'_, '_> {
    fn get(&mut self, at: u64, length: u64) -> io::Result<&[u8]> {
        let end = self.start + self.bytes.len() as u64;
        if at < self.start || at + length > end {
            let wanted = (self.segment.length - at).min(length.max(CHUNK as u64));
            self.bytes.resize(wanted as usize, 0);
            let number = self.segment.header.number;
            let read = self.segment.storage.read(number, at, &mut self.bytes)?;
            self.bytes.truncate(read);
            self.start = at;
        }
        let from = (at - self.start) as usize;
        let bytes = self.bytes.get(from..from + length as usize);
        bytes.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }
}
