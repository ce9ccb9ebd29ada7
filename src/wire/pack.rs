//! The subset of MessagePack that records use: positional arrays, with nil for absent fields and
//! trailing nils omitted. A reader skips unknown fields and never trusts a length.

use rmp::Marker;
use rmp::decode::RmpRead;
use rmp::encode::{self, ByteBuf};

use super::WireError;
use crate::identity::NodeId;

const MAX_DEPTH: usize = 16;
pub(super) const NIL: u8 = 0xc0;

/// Writes a positional array. Its length is written at the end, without the trailing nils.
pub(crate) struct ArrayWriter<'a> {
    buf: &'a mut Vec<u8>,
    head: usize,
    fields: u8,
    /// The end of the array if only nils follow.
    end: usize,
    end_fields: u8,
}

impl<'a> ArrayWriter<'a> {
    pub(crate) fn new(buf: &'a mut Vec<u8>) -> Self {
        let head = buf.len();
        buf.push(0);
        Self { end: head + 1, buf, head, fields: 0, end_fields: 0 }
    }

    fn wrote(&mut self) {
        self.fields += 1;
        self.end = self.buf.len();
        self.end_fields = self.fields;
    }

    pub(crate) fn nil(&mut self) {
        self.buf.push(NIL);
        self.fields += 1;
    }

    pub(crate) fn uint(&mut self, value: u64) {
        write(self.buf, |buf| encode::write_uint(buf, value).map(drop));
        self.wrote();
    }

    pub(crate) fn bool(&mut self, value: bool) {
        write(self.buf, |buf| encode::write_bool(buf, value));
        self.wrote();
    }

    pub(crate) fn str(&mut self, text: &str) {
        write(self.buf, |buf| encode::write_str(buf, text));
        self.wrote();
    }

    pub(crate) fn bin(&mut self, bytes: &[u8]) {
        write(self.buf, |buf| encode::write_bin(buf, bytes));
        self.wrote();
    }

    pub(crate) fn opt_uint(&mut self, value: Option<u64>) {
        match value {
            Some(value) => self.uint(value),
            None => self.nil(),
        }
    }

    pub(crate) fn opt_str(&mut self, text: Option<&str>) {
        match text {
            Some(text) => self.str(text),
            None => self.nil(),
        }
    }

    pub(crate) fn opt_bin(&mut self, bytes: Option<&[u8]>) {
        match bytes {
            Some(bytes) => self.bin(bytes),
            None => self.nil(),
        }
    }

    /// Writes a list, each element by `write_one`; nil if it is empty.
    pub(crate) fn list<T>(
        &mut self,
        items: impl ExactSizeIterator<Item = T>,
        mut write_one: impl FnMut(&mut Vec<u8>, T),
    ) {
        if items.len() == 0 {
            return self.nil();
        }
        let len = u32::try_from(items.len()).expect("lists are far shorter than 2^32");
        write(self.buf, |buf| encode::write_array_len(buf, len).map(drop));
        for item in items {
            write_one(self.buf, item);
        }
        self.wrote();
    }

    /// Writes nils up to the field of that number, counted from 0.
    pub(crate) fn skip_to(&mut self, field: u8) {
        while self.fields < field {
            self.nil();
        }
    }

    /// Writes a value by `write_one`.
    pub(crate) fn nested(&mut self, write_one: impl FnOnce(&mut Vec<u8>)) {
        write_one(self.buf);
        self.wrote();
    }

    /// Ends the array; returns its number of fields.
    pub(crate) fn finish(self) -> u8 {
        self.buf.truncate(self.end);
        assert!(self.end_fields < 16, "records have fewer than 16 fields");
        self.buf[self.head] = Marker::FixArray(self.end_fields).to_u8();
        self.end_fields
    }
}

/// Runs one of rmp's writers on a vector, which can't fail.
fn write<E>(buf: &mut Vec<u8>, f: impl FnOnce(&mut ByteBuf) -> Result<(), E>) {
    let mut bytes = ByteBuf::from_vec(std::mem::take(buf));
    let written = f(&mut bytes);
    *buf = bytes.into_vec();
    debug_assert!(written.is_ok(), "writing to a vector can't fail");
}

/// Writes a string element of a list.
pub(crate) fn push_str(buf: &mut Vec<u8>, text: &str) {
    write(buf, |buf| encode::write_str(buf, text));
}

/// Writes a number outside of an [`ArrayWriter`].
pub(crate) fn push_uint(buf: &mut Vec<u8>, value: u64) {
    write(buf, |buf| encode::write_uint(buf, value).map(drop));
}

/// Reads values from a slice.
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    pub(crate) fn take(&mut self, len: usize) -> Result<&'a [u8], WireError> {
        let (taken, rest) = self.rest.split_at_checked(len).ok_or(WireError::Truncated)?;
        self.rest = rest;
        Ok(taken)
    }

    /// Reads a record's length: a big-endian u32 outside of MessagePack.
    pub(crate) fn length_prefix(&mut self) -> Result<usize, WireError> {
        let bytes = self.take(4)?;
        Ok(u32::from_be_bytes(bytes.try_into().expect("four bytes were taken")) as usize)
    }

    /// Reads the head of an array; returns its fields.
    pub(crate) fn array(&mut self) -> Result<Fields<'a, '_>, WireError> {
        let left = self.array_len()?;
        Ok(Fields { reader: self, left })
    }

    fn array_len(&mut self) -> Result<usize, WireError> {
        match self.marker()? {
            Marker::FixArray(len) => Ok(usize::from(len)),
            Marker::Array16 => Ok(self.be::<2>()? as usize),
            Marker::Array32 => Ok(self.be::<4>()? as usize),
            _ => Err(WireError::Unexpected("expected an array")),
        }
    }

    fn marker(&mut self) -> Result<Marker, WireError> {
        self.rest.read_u8().map(Marker::from_u8).map_err(|_| WireError::Truncated)
    }

    fn peek(&self) -> Option<Marker> {
        self.rest.first().map(|byte| Marker::from_u8(*byte))
    }

    /// Reads a big-endian number of N bytes.
    fn be<const N: usize>(&mut self) -> Result<u64, WireError> {
        Ok(self.take(N)?.iter().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    }

    /// Returns true if the next value is an unsigned integer.
    pub(crate) fn is_uint(&self) -> bool {
        let uint = |marker| {
            matches!(
                marker,
                Marker::FixPos(_) | Marker::U8 | Marker::U16 | Marker::U32 | Marker::U64
            )
        };
        self.peek().is_some_and(uint)
    }

    pub(crate) fn uint(&mut self) -> Result<u64, WireError> {
        match self.marker()? {
            Marker::FixPos(value) => Ok(u64::from(value)),
            Marker::U8 => self.be::<1>(),
            Marker::U16 => self.be::<2>(),
            Marker::U32 => self.be::<4>(),
            Marker::U64 => self.be::<8>(),
            _ => Err(WireError::Unexpected("expected an unsigned integer")),
        }
    }

    pub(crate) fn bool(&mut self) -> Result<bool, WireError> {
        match self.marker()? {
            Marker::True => Ok(true),
            Marker::False => Ok(false),
            _ => Err(WireError::Unexpected("expected a boolean")),
        }
    }

    pub(crate) fn str(&mut self) -> Result<&'a str, WireError> {
        let len = match self.marker()? {
            Marker::FixStr(len) => usize::from(len),
            Marker::Str8 => self.be::<1>()? as usize,
            Marker::Str16 => self.be::<2>()? as usize,
            Marker::Str32 => self.be::<4>()? as usize,
            _ => return Err(WireError::Unexpected("expected a string")),
        };
        std::str::from_utf8(self.take(len)?)
            .map_err(|_| WireError::Unexpected("a string is not UTF-8"))
    }

    pub(crate) fn bin(&mut self) -> Result<&'a [u8], WireError> {
        let len = match self.marker()? {
            Marker::Bin8 => self.be::<1>()? as usize,
            Marker::Bin16 => self.be::<2>()? as usize,
            Marker::Bin32 => self.be::<4>()? as usize,
            _ => return Err(WireError::Unexpected("expected a byte string")),
        };
        self.take(len)
    }

    pub(crate) fn bin_array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        self.bin()?.try_into().map_err(|_| WireError::Unexpected("a byte string of wrong length"))
    }

    pub(crate) fn node_id(&mut self) -> Result<NodeId, WireError> {
        Ok(NodeId::checked(self.bin_array()?)?)
    }

    /// Returns the kind of the next value.
    pub(crate) fn next_is(&self) -> Next {
        match self.peek() {
            Some(Marker::True) => Next::True,
            Some(Marker::FixPos(_) | Marker::U8 | Marker::U16 | Marker::U32 | Marker::U64) => {
                Next::Uint
            }
            Some(Marker::FixStr(_) | Marker::Str8 | Marker::Str16 | Marker::Str32) => Next::Str,
            Some(_) | None => Next::Other,
        }
    }

    /// Skips a nil, if one comes next; returns true if so.
    fn take_nil(&mut self) -> bool {
        let rest = self.rest.strip_prefix(&[NIL]);
        self.rest = rest.unwrap_or(self.rest);
        rest.is_some()
    }

    /// Skips one value of any type.
    pub(crate) fn skip(&mut self) -> Result<(), WireError> {
        self.skip_nested(MAX_DEPTH)
    }

    fn skip_nested(&mut self, depth: usize) -> Result<(), WireError> {
        let depth = depth.checked_sub(1).ok_or(WireError::TooDeep)?;
        let bytes = match self.marker()? {
            Marker::FixPos(_) | Marker::FixNeg(_) | Marker::Null | Marker::True | Marker::False => {
                0
            }
            Marker::U8 | Marker::I8 => 1,
            Marker::U16 | Marker::I16 => 2,
            Marker::U32 | Marker::I32 | Marker::F32 => 4,
            Marker::U64 | Marker::I64 | Marker::F64 => 8,
            Marker::FixStr(len) => usize::from(len),
            Marker::Str8 | Marker::Bin8 => self.be::<1>()? as usize,
            Marker::Str16 | Marker::Bin16 => self.be::<2>()? as usize,
            Marker::Str32 | Marker::Bin32 => self.be::<4>()? as usize,
            Marker::FixExt1 => 2,
            Marker::FixExt2 => 3,
            Marker::FixExt4 => 5,
            Marker::FixExt8 => 9,
            Marker::FixExt16 => 17,
            Marker::Ext8 => self.be::<1>()? as usize + 1,
            Marker::Ext16 => self.be::<2>()? as usize + 1,
            Marker::Ext32 => self.be::<4>()? as usize + 1,
            Marker::FixArray(len) => return self.skip_many(usize::from(len), depth),
            Marker::Array16 => {
                let len = self.be::<2>()? as usize;
                return self.skip_many(len, depth);
            }
            Marker::Array32 => {
                let len = self.be::<4>()? as usize;
                return self.skip_many(len, depth);
            }
            Marker::FixMap(len) => return self.skip_many(2 * usize::from(len), depth),
            Marker::Map16 => {
                let len = self.be::<2>()? as usize;
                return self.skip_many(2 * len, depth);
            }
            Marker::Map32 => {
                let len = self.be::<4>()? as usize;
                return self.skip_many(2 * len, depth);
            }
            Marker::Reserved => return Err(WireError::Unexpected("a reserved marker")),
        };
        self.take(bytes).map(drop)
    }

    fn skip_many(&mut self, count: usize, depth: usize) -> Result<(), WireError> {
        // Each value takes at least one byte, so a false count ends with the bytes.
        for _ in 0..count {
            self.skip_nested(depth)?;
        }
        Ok(())
    }
}

/// The kind of the next value in a [`Reader`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    True,
    Uint,
    Str,
    Other,
}

/// The fields of an array, in order.
pub(crate) struct Fields<'a, 'r> {
    reader: &'r mut Reader<'a>,
    left: usize,
}

impl<'a> Fields<'a, '_> {
    /// Reads the next field; returns an error if it is absent.
    pub(crate) fn need<T>(
        &mut self,
        read: impl FnOnce(&mut Reader<'a>) -> Result<T, WireError>,
    ) -> Result<T, WireError> {
        self.opt(read)?.ok_or(WireError::Unexpected("a field is missing"))
    }

    /// Reads the next field; returns `None` if it is nil or omitted.
    pub(crate) fn opt<T>(
        &mut self,
        read: impl FnOnce(&mut Reader<'a>) -> Result<T, WireError>,
    ) -> Result<Option<T>, WireError> {
        if self.left == 0 {
            return Ok(None);
        }
        self.left -= 1;
        match self.reader.take_nil() {
            true => Ok(None),
            false => read(self.reader).map(Some),
        }
    }

    /// Reads a list; returns an empty one if it is nil or omitted.
    pub(crate) fn list<T>(
        &mut self,
        mut read_one: impl FnMut(&mut Reader<'a>) -> Result<T, WireError>,
    ) -> Result<Vec<T>, WireError> {
        let items = self.opt(|reader| {
            let len = reader.array_len()?;
            // The peer's count is not trusted: no capacity is reserved.
            let mut items = Vec::new();
            for _ in 0..len {
                items.push(read_one(reader)?);
            }
            Ok(items)
        })?;
        Ok(items.unwrap_or_default())
    }

    /// Skips fields that a later version may have added.
    pub(crate) fn finish(self) -> Result<(), WireError> {
        self.reader.skip_many(self.left, MAX_DEPTH)
    }
}
