//! Percentiles of round trips.

use std::time::Duration;

/// The round trips of one contender.
#[derive(Default)]
pub(crate) struct Samples {
    nanos: Vec<u64>,
}

impl Samples {
    pub(crate) fn add(&mut self, took: Duration) {
        self.nanos.push(took.as_nanos() as u64);
    }

    pub(crate) fn extend(&mut self, other: &Self) {
        self.nanos.extend_from_slice(&other.nanos);
    }

    pub(crate) fn len(&self) -> usize {
        self.nanos.len()
    }

    /// The value that `per_mille` thousandths of all samples do not exceed, in microseconds.
    pub(crate) fn percentile(&self, per_mille: usize) -> f64 {
        let mut sorted = self.nanos.clone();
        sorted.sort_unstable();
        let place = (sorted.len() * per_mille).div_ceil(1000).max(1) - 1;
        sorted.get(place).map_or(f64::NAN, |nanos| *nanos as f64 / 1000.0)
    }
}

/// The median of some numbers.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
