//! Reading a journal back: what is right is handed out, what is not is named, nothing is changed.

use std::collections::HashMap;
use std::io;

use super::segment::{ENTRY, FRAME, HEADER, Header, HeaderError, MARK, next_place, record_size};
use super::storage::{RESERVED, Storage};
use super::{Damage, Entry, JournalError, Position, Recovery};

/// How much is read at once.
const CHUNK: usize = 1024 * 1024;

/// Where a journal goes on.
pub(super) struct Resume {
    pub(super) salt: Option<u64>,
    /// The number of the last segment that is there.
    pub(super) last: Option<u64>,
    /// Where what counts of that one ends.
    pub(super) end: u64,
}

/// Reads all segments, and hands out the entries in the order in which they were written.
///
/// What lies behind the end that the next segment names was never promised. Nor was, in the last
/// segment, what isn't valid behind all that is, or that a mark says to be synced: it is the torn
/// tail of a crash, or, if no mark came behind it, a last record that was damaged later. (If that
/// one is all zeros, nothing tells that it was there.) What isn't valid before something that is
/// counts as damage: it may have been the write that a crash tore, whose blocks reach the disk in
/// any order, but nobody can tell, and what is valid is kept. A segment that a later one names and that isn't
/// there is damage as a whole.
pub(super) fn recover(
    storage: &dyn Storage,
    mut take: impl FnMut(Entry<'_>),
) -> Result<(Recovery, Resume), JournalError> {
    let mut recovery = Recovery::default();
    let numbers = storage.segments()?;
    let headers = read_headers(storage, &numbers)?;
    let salt = headers.iter().flatten().map(|header| header.salt).next();
    let seals: HashMap<u64, u64> =
        headers.iter().flatten().map(|header| (header.previous, header.previous_end)).collect();
    let mut resume = Resume { salt, last: numbers.last().copied(), end: HEADER };
    // Segments are removed from the oldest on: before the first that is there none is missed.
    let absent =
        headers.iter().flatten().skip_while(|header| Some(&header.number) == numbers.first());
    for header in absent.filter(|header| numbers.binary_search(&header.previous).is_err()) {
        let (segment, to) = (header.previous, header.previous_end);
        recovery.damaged.push(Damage { segment, from: 0, to });
    }
    for (number, header) in numbers.iter().copied().zip(headers) {
        let length = storage.length(number)?;
        let is_last = Some(number) == resume.last;
        let written = written(storage, number, length)?;
        // One whose header was never finished has room for a first write at the most.
        let was_begun = written > HEADER || length > RESERVED;
        let whole = Damage { segment: number, from: 0, to: written.max(HEADER) };
        let Some(salt) = salt else {
            // Not one header can be read, so no record can be checked.
            recovery.damaged.extend((was_begun || !is_last).then_some(whole));
            continue;
        };
        if header.is_none() && was_begun {
            recovery.damaged.push(Damage { to: HEADER, ..whole });
        }
        let header = header.unwrap_or(Header { salt, number, previous: 0, previous_end: 0 });
        let seal = seals.get(&number).copied();
        let length = seal.unwrap_or(length).min(length);
        let segment = Segment { storage, header, length, written };
        let promised = match seal {
            Some(end) => end,
            // Without a later segment that tells, a first look finds how far it reaches.
            None => segment.reached()?,
        };
        let end = segment.read(promised, &mut recovery, &mut take)?;
        if seal.is_none() {
            recovery.torn += written.saturating_sub(end);
        }
        resume.end = end;
        recovery.segments += 1;
    }
    Ok((recovery, resume))
}

/// Where a segment's bytes end, but for the zeros behind them.
fn written(storage: &dyn Storage, number: u64, length: u64) -> io::Result<u64> {
    let (mut end, mut bytes) = (length, vec![0; CHUNK.min(length as usize)]);
    while end > 0 {
        let start = end.saturating_sub(CHUNK as u64);
        let part = &mut bytes[..(end - start) as usize];
        let read = storage.read(number, start, part)?;
        if let Some(last) = part[..read].iter().rposition(|byte| *byte != 0) {
            // A record may end with some of its own.
            return Ok(next_place(start + last as u64).min(length));
        }
        end = start;
    }
    Ok(0)
}

/// Refuses segments of a format that this version doesn't know.
pub(super) fn check_versions(storage: &dyn Storage) -> Result<(), JournalError> {
    read_headers(storage, &storage.segments()?)?;
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
    /// Up to where it is looked at.
    length: u64,
    /// Behind this there are only zeros.
    written: u64,
}

impl Segment<'_> {
    /// The furthest position before which all was written: of a record that is valid, or of which
    /// a mark says that it was synced.
    fn reached(&self) -> io::Result<u64> {
        let mut reached = HEADER.min(self.length);
        self.scan(|position, found| {
            if let Some((kind, payload)) = found {
                reached = reached.max(position);
                if kind == MARK
                    && let Ok(mark) = payload.try_into()
                {
                    reached = reached.max(u64::from_le_bytes(mark).min(self.length));
                }
            }
            true
        })?;
        Ok(reached)
    }

    /// Hands out what is valid; damage is what isn't before `promised`. Where what counts ends.
    fn read(
        &self,
        promised: u64,
        recovery: &mut Recovery,
        take: &mut impl FnMut(Entry<'_>),
    ) -> io::Result<u64> {
        let (mut end, mut gap) = (HEADER.min(self.length), None);
        self.scan(|position, found| {
            let Some((kind, payload)) = found else {
                gap.get_or_insert(position);
                return position < promised;
            };
            if let Some(from) = gap.take() {
                recovery.damaged.push(Damage { segment: self.header.number, from, to: position });
            }
            if kind == ENTRY {
                recovery.entries += 1;
                let length = payload.len() as u32;
                let position = Position { segment: self.header.number, offset: position, length };
                take(Entry { position, payload });
            }
            end = position + record_size(payload.len() as u64);
            true
        })?;
        if let Some(from) = gap
            && from < promised
        {
            recovery.damaged.push(Damage { segment: self.header.number, from, to: promised });
            end = promised;
        } else if end < promised {
            // It was cut short.
            recovery.damaged.push(Damage { segment: self.header.number, from: end, to: promised });
            end = promised;
        }
        Ok(end)
    }

    /// Goes through the segment: each place with the kind and payload of its record, or with
    /// `None` where there is none and the search goes on at the next place. Ends when `visit`
    /// says no.
    fn scan(&self, mut visit: impl FnMut(u64, Option<(u32, &[u8])>) -> bool) -> io::Result<()> {
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
            if !visit(position, found.map(|(frame, payload)| (frame.kind, payload))) {
                return Ok(());
            }
            position = next;
        }
        Ok(())
    }
}

/// The part of a segment that is in memory.
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
