//! Workloads: the definitions of what to compare, from a TOML file.

use std::num::NonZeroU32;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use serde::{Deserialize, Deserializer, Serialize};

use super::systems::SystemName;

/// The workloads that run if no file is given.
pub(super) const STANDARD: &str = include_str!("standard.toml");
/// The minimum body size: the body holds the message's stamp.
pub(super) const MIN_SIZE: usize = 24;
const MAX_SIZE: usize = 1024 * 1024;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    workload: Vec<Workload>,
}

/// One workload. Each missing field has the default given with it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Workload {
    pub(super) name: String,
    pub(super) pattern: Pattern,
    /// Body size, in bytes: 64.
    pub(super) size: usize,
    /// Messages per second in all, or "max": full speed, the default.
    pub(super) rate: Rate,
    /// The number of messages in flight for each sender, where it waits for an outcome: 1.
    pub(super) window: usize,
    pub(super) publishers: usize,
    pub(super) subscribers: usize,
    pub(super) workers: usize,
    /// true, false, or "both": each system as far as it can.
    pub(super) guaranteed: Guaranteed,
    /// Use TLS.
    pub(super) tls: bool,
    /// The minimum length of a round.
    #[serde(deserialize_with = "duration")]
    pub(super) seconds: Duration,
    pub(super) fault: Option<Fault>,
    /// The number of rounds, instead of the command's.
    pub(super) rounds: Option<NonZeroU32>,
    /// The systems that take part; by default all that can.
    pub(super) systems: Option<Vec<SystemName>>,
}

impl Default for Workload {
    fn default() -> Self {
        Self {
            name: String::new(),
            pattern: Pattern::Publish,
            size: 64,
            rate: Rate::Max,
            window: 1,
            publishers: 1,
            subscribers: 1,
            workers: 1,
            guaranteed: Guaranteed::No,
            tls: false,
            seconds: Duration::from_secs(2),
            fault: None,
            rounds: None,
            systems: None,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Pattern {
    /// Events from publishers to every subscriber.
    Publish,
    /// One-way messages from publishers to one of the workers.
    Work,
    /// Requests of publishers, answered by one of the workers.
    Request,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Rate {
    Max,
    PerSecond(f64),
}

impl<'de> Deserialize<'de> for Rate {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "a number of messages a second, or \"max\"")]
        enum Text {
            Number(f64),
            Word(String),
        }
        match Text::deserialize(deserializer)? {
            Text::Number(rate) if rate > 0.0 && rate.is_finite() => Ok(Self::PerSecond(rate)),
            Text::Word(word) if word == "max" => Ok(Self::Max),
            _ => Err(serde::de::Error::custom("rate is a number above 0, or \"max\"")),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Guaranteed {
    No,
    Yes,
    Both,
}

impl<'de> Deserialize<'de> for Guaranteed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "true, false or \"both\"")]
        enum Text {
            Flag(bool),
            Word(String),
        }
        match Text::deserialize(deserializer)? {
            Text::Flag(false) => Ok(Self::No),
            Text::Flag(true) => Ok(Self::Yes),
            Text::Word(word) if word == "both" => Ok(Self::Both),
            Text::Word(_) => Err(serde::de::Error::custom("guaranteed is true, false or \"both\"")),
        }
    }
}

/// A fault injected during a round.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Fault {
    pub(super) kill: Target,
    #[serde(deserialize_with = "duration")]
    pub(super) after: Duration,
    #[serde(rename = "for", deserialize_with = "duration")]
    pub(super) lasts: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Target {
    /// The first of the receivers.
    Receiver,
    Broker,
    /// The link to the first of the receivers.
    Link,
}

impl Target {
    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Receiver => "the receiver is killed",
            Self::Broker => "the broker is killed",
            Self::Link => "the receiver's link is cut",
        }
    }
}

fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "a time such as \"5s\", or a number of seconds")]
    enum Text {
        Seconds(f64),
        Words(String),
    }
    match Text::deserialize(deserializer)? {
        Text::Seconds(seconds) => {
            Duration::try_from_secs_f64(seconds).map_err(serde::de::Error::custom)
        }
        Text::Words(words) => humantime::parse_duration(&words).map_err(serde::de::Error::custom),
    }
}

impl Workload {
    /// The workloads of a file, or the standard ones.
    pub(super) fn load(path: Option<&Path>) -> anyhow::Result<Vec<Self>> {
        let (text, name) = match path {
            Some(path) => {
                let text = std::fs::read_to_string(path).with_context(|| {
                    format!("the workload file {} can't be read", path.display())
                })?;
                (text, path.display().to_string())
            }
            None => (STANDARD.to_owned(), "the standard workloads".to_owned()),
        };
        Self::parse(&text).with_context(|| name)
    }

    fn parse(text: &str) -> anyhow::Result<Vec<Self>> {
        let File { workload } = toml::from_str(text)?;
        ensure!(!workload.is_empty(), "the file has no [[workload]]");
        for (place, it) in workload.iter().enumerate() {
            let name = match it.name.as_str() {
                "" => format!("workload {}", place + 1),
                name => format!("workload {name:?}"),
            };
            it.check().context(name)?;
            let twice = workload[..place].iter().any(|earlier| earlier.name == it.name);
            ensure!(!twice, "two workloads are named {:?}", it.name);
        }
        Ok(workload)
    }

    fn check(&self) -> anyhow::Result<()> {
        ensure!(!self.name.is_empty(), "the workload has no name");
        ensure!(
            (MIN_SIZE..=MAX_SIZE).contains(&self.size),
            "size is {}; it takes {MIN_SIZE} to {MAX_SIZE} bytes",
            self.size
        );
        for (what, count) in [
            ("publishers", self.publishers),
            ("subscribers", self.subscribers),
            ("workers", self.workers),
            ("window", self.window),
        ] {
            let most = if what == "window" { 65_536 } else { 64 };
            ensure!((1..=most).contains(&count), "{what} is {count}; it takes 1 to {most}");
        }
        ensure!(self.seconds >= Duration::from_millis(100), "seconds is under 0.1");
        ensure!(
            self.pattern != Pattern::Request || self.guaranteed == Guaranteed::No,
            "a request is not guaranteed: the reply is the confirmation"
        );
        let Some(fault) = &self.fault else { return Ok(()) };
        if fault.after + fault.lasts >= self.seconds {
            bail!(
                "the fault lasts until {:?}, and the round until {:?}",
                fault.after + fault.lasts,
                self.seconds
            );
        }
        ensure!(self.rate != Rate::Max, "a fault needs a rate, or the time of a loss is unknown");
        Ok(())
    }

    pub(super) fn receivers(&self) -> usize {
        match self.pattern {
            Pattern::Publish => self.subscribers,
            Pattern::Work | Pattern::Request => self.workers,
        }
    }

    /// The number of receivers of each message.
    pub(super) fn fan_out(&self) -> usize {
        match self.pattern {
            Pattern::Publish => self.subscribers,
            Pattern::Work | Pattern::Request => 1,
        }
    }

    /// The workload in one line.
    pub(super) fn summary(&self) -> String {
        let size = match self.size {
            size if size % 1024 == 0 => format!("{} KiB", size / 1024),
            size => format!("{size} B"),
        };
        let (what, to) = match self.pattern {
            Pattern::Publish => ("published", format!("{} subscribers", self.subscribers)),
            Pattern::Work => ("sent one way", format!("{} workers", self.workers)),
            Pattern::Request => ("asked and answered", format!("{} workers", self.workers)),
        };
        let rate = match self.rate {
            Rate::Max if self.pattern == Pattern::Publish && self.guaranteed == Guaranteed::No => {
                "as fast as it goes".to_owned()
            }
            Rate::Max => format!("as fast as it goes, {} at a time", self.window),
            Rate::PerSecond(rate) => format!("at {rate:.0}/s"),
        };
        let kept = match self.guaranteed {
            Guaranteed::No => "",
            Guaranteed::Yes => ", guaranteed",
            Guaranteed::Both => ", guaranteed by those that can",
        };
        let over = if self.tls { "TLS" } else { "TCP" };
        format!("{size} {what} {rate}, {} to {to}, over {over}{kept}", self.publishers)
            .replace("1 to 1 subscribers", "one to one")
            .replace("1 to 1 workers", "one to one")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_standard_workloads_make_sense() {
        let standard = Workload::load(None).unwrap();
        assert!(standard.len() >= 6);
        let paced = standard.iter().find(|it| it.name == "paced").unwrap();
        assert_eq!(paced.summary(), "1 KiB published at 1000/s, one to one, over TCP");
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_a_reason() {
        for (line, told) in [
            ("speed = 3", "unknown field `speed`"),
            ("size = 3", "size is 3; it takes 24 to"),
            ("rate = -1", "rate is a number above 0"),
            ("rate = \"fast\"", "rate is a number above 0"),
            ("pattern = \"shout\"", "unknown variant `shout`"),
            ("publishers = 0", "publishers is 0; it takes 1 to 64"),
            ("seconds = 0.01", "under 0.1"),
            ("pattern = \"request\"\nguaranteed = true", "a request is not guaranteed"),
            ("fault = { kill = \"cat\", after = 1, for = 1 }", "unknown variant `cat`"),
            (
                "fault = { kill = \"link\", after = \"1s\", for = \"9s\" }\nrate = 5",
                "lasts until 10s",
            ),
            ("fault = { kill = \"link\", after = 0.5, for = 0.5 }", "a fault needs a rate"),
            ("systems = [\"pigeon\"]", "unknown variant `pigeon`"),
        ] {
            let text = format!("[[workload]]\nname = \"x\"\n{line}\n");
            let error = format!("{:#}", Workload::parse(&text).unwrap_err());
            assert!(error.contains(told), "{line}: {error}");
        }
        assert!(Workload::parse("").is_err());
        assert!(Workload::parse("[[workload]]\nname = \"x\"\n[[workload]]\nname = \"x\"").is_err());
    }
}
