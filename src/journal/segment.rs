//! The encoding of a segment: its header and its records. Pure.
//!
//! ```text
//! header   magic (8) | version u32 | salt u64 | number u64 | previous u64 | end u64 | crc u32
//! record   check u32 | length u32 | tag u32 | crc u32 | payload | zeros up to a multiple of 8
//! tag      kind (8 bits) | number of messages in an entry (24 bits)
//! ```
//!
//! A journal with a segment of version 2 has a manifest, and the entries of that segment carry
//! their number of messages. In segments of version 1 the number is always zero.
//!
//! Any number of zeros may follow the last record: the file was preallocated.
//!
//! All numbers are little-endian; both checksums are CRC-32C (Castagnoli, RFC 3720). `check` covers
//! salt, segment number, position, length and tag, so that the length can be trusted before the
//! payload is read; `crc` continues `check` over the payload. So bytes that were valid elsewhere,
//! in an older file or at another place, are invalid here. The salt is random for each journal, so
//! that no payload can contain a record.

use crc32c::{crc32c, crc32c_append};

const MAGIC: &[u8; 8] = b"peerbusJ";
/// The format version that this crate writes; it reads all earlier ones.
pub(super) const VERSION: u32 = 2;
/// The first version with a manifest.
pub(super) const WITH_MANIFEST: u32 = 2;
/// The length of a header, in bytes.
pub(super) const HEADER: u64 = 48;
/// The length of a record before its payload, in bytes.
pub(super) const FRAME: u64 = 16;
/// The alignment of records, in bytes.
const ALIGN: u64 = 8;
/// The kind of a record written by the journal's user.
pub(super) const ENTRY: u32 = 0;
/// The kind of a mark, whose payload is a u64 position: everything before it was synced.
pub(super) const MARK: u32 = 1;
const KIND_BITS: u32 = 8;
const MOST_MESSAGES: u32 = u32::MAX >> KIND_BITS;

/// Returns the tag of an entry that holds n messages.
pub(super) fn entry_tag(messages: u32) -> u32 {
    ENTRY | messages.min(MOST_MESSAGES) << KIND_BITS
}

/// The header of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) version: u32,
    /// The same in all segments of a journal.
    pub(super) salt: u64,
    pub(super) number: u64,
    /// The previous segment; zero if there was none.
    pub(super) previous: u64,
    /// The end of the previous segment. Bytes after it were never promised.
    pub(super) previous_end: u64,
}

/// The error of decoding a header.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum HeaderError {
    /// The header is too short or its checksum is wrong: it was never completed, or is damaged.
    Invalid,
    /// The format version is unknown.
    Version(u32),
}

impl Header {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&self.version.to_le_bytes());
        for number in [self.salt, self.number, self.previous, self.previous_end] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.extend_from_slice(&crc32c(&bytes).to_le_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, HeaderError> {
        let bytes = bytes.get(..HEADER as usize).ok_or(HeaderError::Invalid)?;
        if &bytes[..8] != MAGIC {
            return Err(HeaderError::Invalid);
        }
        if u32_at(bytes, 44) != crc32c(&bytes[..44]) {
            return Err(HeaderError::Invalid);
        }
        // Headers are alike in all versions; the rest may differ.
        match u32_at(bytes, 8) {
            version @ 1..=VERSION => Ok(Self {
                version,
                salt: u64_at(bytes, 12),
                number: u64_at(bytes, 20),
                previous: u64_at(bytes, 28),
                previous_end: u64_at(bytes, 36),
            }),
            version => Err(HeaderError::Version(version)),
        }
    }

    fn check(&self, position: u64, frame: Frame) -> u32 {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&self.salt.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.number.to_le_bytes());
        bytes[16..24].copy_from_slice(&position.to_le_bytes());
        bytes[24..28].copy_from_slice(&frame.length.to_le_bytes());
        bytes[28..].copy_from_slice(&frame.tag.to_le_bytes());
        crc32c(&bytes)
    }

    /// Appends the record for `position` to `buf`.
    pub(super) fn encode_record(&self, position: u64, tag: u32, payload: &[u8], buf: &mut Vec<u8>) {
        let frame = Frame { length: payload.len() as u32, tag };
        let check = self.check(position, frame);
        for number in [check, frame.length, frame.tag, crc32c_append(check, payload)] {
            buf.extend_from_slice(&number.to_le_bytes());
        }
        buf.extend_from_slice(payload);
        buf.resize(buf.len().next_multiple_of(ALIGN as usize), 0);
    }

    /// Decodes the frame of the record at `position`, if `bytes` hold one.
    pub(super) fn decode_frame(&self, position: u64, bytes: &[u8]) -> Option<Frame> {
        let frame = Frame { length: u32_at(bytes, 4), tag: u32_at(bytes, 8) };
        // Zeros are not a record, even if their checksum is zero too.
        let is_written = bytes[..FRAME as usize].iter().any(|byte| *byte != 0);
        (is_written && u32_at(bytes, 0) == self.check(position, frame)).then_some(frame)
    }
}

/// The frame of a record: its fields before the payload, without the checksums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) length: u32,
    tag: u32,
}

impl Frame {
    pub(super) fn kind(self) -> u32 {
        self.tag & !(u32::MAX << KIND_BITS)
    }

    /// Returns the number of messages that the entry holds.
    pub(super) fn messages(self) -> u32 {
        self.tag >> KIND_BITS
    }

    /// Returns the size of the whole record, in bytes.
    pub(super) fn size(self) -> u64 {
        record_size(u64::from(self.length))
    }

    /// Returns the payload of the record `bytes`, if its checksum matches.
    pub(super) fn payload(self, bytes: &[u8]) -> Option<&[u8]> {
        let payload = bytes.get(FRAME as usize..)?.get(..self.length as usize)?;
        (u32_at(bytes, 12) == crc32c_append(u32_at(bytes, 0), payload)).then_some(payload)
    }
}

/// Returns the size of a record with a payload of that length, in bytes.
pub(super) fn record_size(payload: u64) -> u64 {
    (FRAME + payload).next_multiple_of(ALIGN)
}

/// Returns the next position at which a record may begin.
pub(super) fn next_place(position: u64) -> u64 {
    (position + 1).next_multiple_of(ALIGN)
}

/// Corrects all checksums of bytes that may be a segment, so that a fuzzer gets past them.
#[cfg(fuzzing)]
pub(super) fn correct(bytes: &mut [u8]) {
    if bytes.len() < HEADER as usize {
        return;
    }
    bytes[..8].copy_from_slice(MAGIC);
    let check = crc32c(&bytes[..44]);
    bytes[44..48].copy_from_slice(&check.to_le_bytes());
    let Ok(header) = Header::decode(bytes) else { return };
    let mut at = HEADER as usize;
    while let Some(record) = bytes.get_mut(at..)
        && record.len() >= FRAME as usize
    {
        let frame = Frame { length: u32_at(record, 4), tag: u32_at(record, 8) };
        let check = header.check(at as u64, frame);
        record[..4].copy_from_slice(&check.to_le_bytes());
        let payload = record.get(FRAME as usize..).and_then(|it| it.get(..frame.length as usize));
        let Some(crc) = payload.map(|payload| crc32c_append(check, payload)) else { return };
        record[12..16].copy_from_slice(&crc.to_le_bytes());
        at += frame.size() as usize;
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a header whose salt makes the checksum of an empty frame at `position` zero. CRCs
    /// are linear, so that elimination finds such a salt.
    fn unlucky(position: u64) -> Header {
        let header =
            |salt| Header { version: VERSION, salt, number: 1, previous: 0, previous_end: 0 };
        let check = |salt| header(salt).check(position, Frame { length: 0, tag: ENTRY });
        let zero = check(0);
        let (mut salt, mut left, mut basis) = (0, zero, Vec::<(u32, u64)>::new());
        for bit in 0..64 {
            let (mut value, mut made_of) = (check(1 << bit) ^ zero, 1u64 << bit);
            for (other, of) in &basis {
                if value ^ other < value {
                    (value, made_of) = (value ^ other, made_of ^ of);
                }
            }
            if value != 0 {
                basis.push((value, made_of));
                basis.sort_unstable_by(|a, b| b.cmp(a));
            }
        }
        for (value, made_of) in basis {
            if left ^ value < left {
                (left, salt) = (left ^ value, salt ^ made_of);
            }
        }
        assert_eq!(check(salt), 0);
        header(salt)
    }

    #[test]
    fn zeros_are_no_record_though_their_checksum_may_be_zero() {
        let header = unlucky(HEADER);
        assert_eq!(header.decode_frame(HEADER, &[0; 64]), None);
        let mut empty = Vec::new();
        header.encode_record(HEADER + 8, ENTRY, b"", &mut empty);
        assert!(header.decode_frame(HEADER + 8, &empty).is_some());
    }
}
