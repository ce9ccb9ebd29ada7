//! Counts of the sent and received messages.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// The length of a moment, in nanoseconds.
pub(super) const MOMENT: u64 = 100_000_000;

/// The stamp at the beginning of a message's body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    pub(super) seq: u64,
    /// The time at which the message is due, by the machine's monotonic clock, in nanoseconds.
    pub(super) due: u64,
    pub(super) sender: u32,
    /// The message belongs to the warm-up, and does not count.
    pub(super) warm: bool,
}

impl Stamp {
    pub(super) fn body(self, size: usize) -> Vec<u8> {
        let mut body = Vec::with_capacity(size);
        body.extend_from_slice(&self.seq.to_le_bytes());
        body.extend_from_slice(&self.due.to_le_bytes());
        body.extend_from_slice(&self.sender.to_le_bytes());
        body.extend_from_slice(&u32::from(self.warm).to_le_bytes());
        body.resize(size, 7);
        body
    }

    pub(super) fn read(body: &[u8]) -> Option<Self> {
        let (seq, rest) = body.split_first_chunk()?;
        let (due, rest) = rest.split_first_chunk()?;
        let (sender, rest) = rest.split_first_chunk()?;
        let (warm, _) = rest.split_first_chunk()?;
        Some(Self {
            seq: u64::from_le_bytes(*seq),
            due: u64::from_le_bytes(*due),
            sender: u32::from_le_bytes(*sender),
            warm: u32::from_le_bytes(*warm) != 0,
        })
    }
}

/// The machine's monotonic clock, which all its processes share, in nanoseconds.
#[cfg(unix)]
pub(super) fn now() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

#[cfg(not(unix))]
pub(super) fn now() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos() as u64)
}

/// Latencies, in nanoseconds, to three digits.
pub(super) struct Latencies(Histogram<u64>);

impl Latencies {
    pub(super) fn new() -> Self {
        let longest = Duration::from_secs(600).as_nanos() as u64;
        Self(Histogram::new_with_bounds(1, longest, 3).expect("the bounds are in order"))
    }

    pub(super) fn add(&mut self, nanos: u64) {
        self.0.saturating_record(nanos.max(1));
    }

    pub(super) fn merge(&mut self, buckets: &[(u64, u64)]) {
        for (nanos, count) in buckets {
            self.0.saturating_record_n((*nanos).max(1), *count);
        }
    }

    fn buckets(&self) -> Vec<(u64, u64)> {
        self.0.iter_recorded().map(|it| (it.value_iterated_to(), it.count_at_value())).collect()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The latency at a quantile, in microseconds; NaN if there are no samples.
    pub(super) fn at(&self, quantile: f64) -> f64 {
        match self.is_empty() {
            true => f64::NAN,
            false => self.0.value_at_quantile(quantile) as f64 / 1000.0,
        }
    }

    /// The distribution: shares of messages, closer and closer to 1, and the latencies that they
    /// did not exceed.
    pub(super) fn curve(&self) -> Vec<(f64, f64)> {
        if self.is_empty() {
            return Vec::new();
        }
        let mut shares = vec![0.0, 0.1, 0.25, 0.5, 0.625, 0.75];
        let mut rest = 0.125;
        while rest * self.0.len() as f64 >= 1.0 && rest > 1e-6 {
            shares.push(1.0 - rest);
            rest /= 2.0;
        }
        shares.into_iter().map(|share| (share, self.at(share))).collect()
    }
}

/// The counts of a receiver, or of a requester's replies.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Tally {
    /// Latencies from the due time, in nanoseconds, each with its number of messages.
    pub(super) latencies: Vec<(u64, u64)>,
    /// Messages received, each counted once.
    pub(super) received: u64,
    pub(super) duplicated: u64,
    pub(super) out_of_order: u64,
    /// Counts by tenths of a second: of arrival, and of the due time.
    pub(super) arrived: Vec<u64>,
    pub(super) due: Vec<u64>,
    /// The time of the last arrival.
    pub(super) last: u64,
}

/// Counts arrivals.
pub(super) struct Counter {
    start: u64,
    tally: Tally,
    latencies: Latencies,
    seen: HashMap<u32, Seen>,
}

/// The messages seen from one sender: a bit for each, and the highest number plus one.
#[derive(Default)]
struct Seen {
    bits: Vec<u64>,
    next: u64,
}

impl Seen {
    /// Records a message; returns true if it is new.
    fn add(&mut self, seq: u64) -> bool {
        let (place, bit) = ((seq / 64) as usize, 1 << (seq % 64));
        if place >= self.bits.len() {
            self.bits.resize(place + 1, 0);
        }
        let new = self.bits[place] & bit == 0;
        self.bits[place] |= bit;
        new
    }
}

impl Counter {
    pub(super) fn new(start: u64) -> Self {
        let (tally, latencies) = (Tally::default(), Latencies::new());
        Self { start, tally, latencies, seen: HashMap::new() }
    }

    pub(super) fn add(&mut self, stamp: Stamp, at: u64) {
        let seen = self.seen.entry(stamp.sender).or_default();
        if !seen.add(stamp.seq) {
            self.tally.duplicated += 1;
            return;
        }
        if stamp.seq < seen.next {
            self.tally.out_of_order += 1;
        }
        seen.next = seen.next.max(stamp.seq + 1);
        self.tally.received += 1;
        self.latencies.add(at.saturating_sub(stamp.due));
        self.tally.last = self.tally.last.max(at);
        count(&mut self.tally.arrived, at.saturating_sub(self.start));
        count(&mut self.tally.due, stamp.due.saturating_sub(self.start));
    }

    pub(super) fn received(&self) -> u64 {
        self.tally.received
    }

    pub(super) fn finish(mut self) -> Tally {
        self.tally.latencies = self.latencies.buckets();
        self.tally
    }
}

/// Counts a message in its moment.
pub(super) fn count(moments: &mut Vec<u64>, since_start: u64) {
    // No round lasts a day; a later time is a fault, and must not exhaust the memory.
    let moment = (since_start / MOMENT).min(864_000) as usize;
    if moment >= moments.len() {
        moments.resize(moment + 1, 0);
    }
    moments[moment] += 1;
}

/// The arrivals at a receiver that may be killed, written at once: written data outlives the
/// process.
pub(super) struct Log(File);

const ENTRY: usize = 28;

impl Log {
    pub(super) fn open(path: &Path) -> anyhow::Result<Self> {
        let file = File::options().create(true).append(true).open(path);
        Ok(Self(file.with_context(|| path.display().to_string())?))
    }

    pub(super) fn add(&mut self, stamp: Stamp, at: u64) -> std::io::Result<()> {
        let mut entry = [0; ENTRY];
        entry[..8].copy_from_slice(&stamp.seq.to_le_bytes());
        entry[8..16].copy_from_slice(&stamp.due.to_le_bytes());
        entry[16..24].copy_from_slice(&at.to_le_bytes());
        entry[24..].copy_from_slice(&stamp.sender.to_le_bytes());
        self.0.write_all(&entry)
    }

    pub(super) fn entries(path: &Path) -> u64 {
        std::fs::metadata(path).map_or(0, |it| it.len() / ENTRY as u64)
    }

    /// Counts the entries, in their order.
    pub(super) fn tally(path: &Path, start: u64) -> anyhow::Result<Tally> {
        let (mut counter, mut bytes) = (Counter::new(start), Vec::new());
        if path.exists() {
            File::open(path)?.read_to_end(&mut bytes)?;
        }
        for entry in bytes.chunks_exact(ENTRY) {
            let number =
                |at: usize| entry[at..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
            let sender = entry[24..].first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
            let stamp = Stamp { seq: number(0), due: number(8), sender, warm: false };
            counter.add(stamp, number(16));
        }
        Ok(counter.finish())
    }
}

/// The counts of a sender.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Sent {
    pub(super) sent: u64,
    /// The number of those reported to the sender as lost or unheard.
    pub(super) told: u64,
    /// Counts by the tenths of a second in which they were due.
    pub(super) due: Vec<u64>,
    /// The replies, if the sender makes requests.
    pub(super) replies: Option<Tally>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamp(seq: u64) -> Stamp {
        Stamp { seq, due: seq * 1000, sender: 1, warm: false }
    }

    #[test]
    fn a_stamp_survives_in_a_body() {
        let stamp = Stamp { seq: 5, due: 6, sender: 7, warm: true };
        assert_eq!(Stamp::read(&stamp.body(100)), Some(stamp));
        assert_eq!(stamp.body(24).len(), 24);
        assert_eq!(Stamp::read(&[0; 10]), None);
    }

    #[test]
    fn what_comes_twice_or_late_is_counted_as_that() {
        let mut counter = Counter::new(0);
        for seq in [0, 1, 3, 2, 3, 70] {
            counter.add(stamp(seq), 100_000);
        }
        let tally = counter.finish();
        assert_eq!((tally.received, tally.duplicated, tally.out_of_order), (5, 1, 1));
        assert_eq!(tally.arrived, [5]);
        assert_eq!(tally.latencies.iter().map(|(_, count)| count).sum::<u64>(), 5);
    }

    #[test]
    fn a_log_tells_the_same_as_the_counter() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        for part in [[0, 1], [1, 2]] {
            let mut log = Log::open(&path).unwrap();
            part.into_iter().for_each(|seq| log.add(stamp(seq), 9000).unwrap());
        }
        assert_eq!(Log::entries(&path), 4);
        let tally = Log::tally(&path, 0).unwrap();
        assert_eq!((tally.received, tally.duplicated), (3, 1));
    }

    #[test]
    fn percentiles_count_what_they_say() {
        let mut latencies = Latencies::new();
        (1..=1000).for_each(|n| latencies.add(n * 1000));
        assert!((latencies.at(0.5) - 500.0).abs() < 2.0);
        assert!((latencies.at(0.99) - 990.0).abs() < 2.0);
        assert!(latencies.curve().windows(2).all(|pair| pair[0].1 <= pair[1].1));
        assert!(Latencies::new().at(0.5).is_nan());
    }
}
