//! The addresses of brokers.

use std::fmt;
use std::str::FromStr;

use super::adapter::{ADAPTERS, Adapter};
use super::kind::BrokerKind;

/// A broker's address: `peerbus://HOST:PORT` for `peerbus broker`, `nats://` or `tls://` for NATS,
/// `amqp://` or `amqps://` for RabbitMQ; with `USER:PASSWORD@` before the host if the broker
/// requires that.
///
/// `Display` and `Debug` never show the password.
#[derive(Clone, PartialEq, Eq)]
pub struct BrokerUrl {
    kind: BrokerKind,
    text: String,
    host: String,
    port: u16,
}

/// A text that is not a broker's address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BrokerUrlError {
    /// The text does not begin with a known scheme.
    #[error(
        "{found:?} is no broker's scheme; write peerbus, nats, tls, amqp or amqps, and then ://HOST"
    )]
    Scheme {
        /// The beginning of the text.
        found: String,
    },
    /// The rest of the text is not a host and port.
    #[error("the broker's address has no host, or an invalid port; write {scheme}://HOST:PORT")]
    Host {
        /// The scheme.
        scheme: String,
    },
    /// This build does not support that kind of broker.
    #[error(
        "this build does not support {kind}; build with the feature: cargo build --features {feature}"
    )]
    NotBuiltIn {
        /// The kind of broker.
        kind: BrokerKind,
        /// The Cargo feature.
        feature: &'static str,
    },
}

impl BrokerUrl {
    /// Returns this build's adapter for the broker.
    pub(super) fn adapter(&self) -> &'static Adapter {
        Adapter::of(self.kind)
    }

    /// The kind of broker.
    pub fn kind(&self) -> BrokerKind {
        self.kind
    }

    /// Returns the address, including its secrets.
    pub(super) fn reveal(&self) -> &str {
        &self.text
    }

    /// The host, without the brackets of an IPv6 address.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl FromStr for BrokerUrl {
    type Err = BrokerUrlError;

    fn from_str(text: &str) -> Result<Self, BrokerUrlError> {
        let (scheme, rest) = text.split_once("://").unwrap_or((text, ""));
        let of_scheme = |adapter: &&Adapter| adapter.port(scheme).is_some();
        let Some(adapter) = ADAPTERS.iter().find(of_scheme) else {
            // If the scheme was left out, this may contain a password.
            let found = scheme.split([':', '@', '/']).next().unwrap_or_default().to_owned();
            return Err(BrokerUrlError::Scheme { found });
        };
        let (kind, usual_port) = (adapter.kind, adapter.port(scheme).unwrap_or_default());
        let bad = || BrokerUrlError::Host { scheme: scheme.into() };
        let authority = rest.split(['/', '?']).next().unwrap_or_default();
        let address = authority.rsplit_once('@').map_or(authority, |(_, address)| address);
        let (host, port) = match address.rsplit_once(':') {
            Some((host, port)) if !port.contains(']') => (host, port.parse().map_err(|_| bad())?),
            _ => (address, usual_port),
        };
        let host = host.trim_start_matches('[').trim_end_matches(']');
        if host.is_empty() || host.chars().any(|c| c.is_whitespace() || c.is_control()) {
            return Err(bad());
        }
        if adapter.connect.is_none() {
            return Err(BrokerUrlError::NotBuiltIn { kind, feature: adapter.feature });
        }
        Ok(Self { kind, text: text.into(), host: host.into(), port })
    }
}

impl fmt::Display for BrokerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (scheme, rest) = self.text.split_once("://").unwrap_or_default();
        let shown = rest.rsplit_once('@').map_or(rest, |(_secret, rest)| rest);
        write!(f, "{scheme}://{shown}")
    }
}

impl fmt::Debug for BrokerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BrokerUrl({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_a_kind_a_host_and_a_port() {
        let url: BrokerUrl = "peerbus://127.0.0.1:7".parse().unwrap();
        assert_eq!((url.kind(), url.host(), url.port()), (BrokerKind::Embedded, "127.0.0.1", 7));
        let url: BrokerUrl = "peerbus://[::1]".parse().unwrap();
        assert_eq!((url.host(), url.port()), ("::1", 4333));
    }

    #[cfg(all(feature = "nats", feature = "rabbitmq"))]
    #[test]
    fn a_password_is_never_shown() {
        for text in ["nats://me:hunter2@example:4222", "amqps://me:hunter2@[::1]/%2f"] {
            let url: BrokerUrl = text.parse().unwrap();
            assert!(!format!("{url} {url:?}").contains("hunter2"), "{url:?}");
            assert_eq!(url.reveal(), text);
        }
        let error = "me:hunter2@example".parse::<BrokerUrl>().unwrap_err();
        assert!(!error.to_string().contains("hunter2"), "{error}");
    }

    #[test]
    fn what_is_wrong_with_an_address_is_named() {
        for (text, told) in [
            ("", "no broker's scheme"),
            ("mqtt://x", "\"mqtt\" is no broker's scheme"),
            ("peerbus://", "no host"),
            ("peerbus://x:port", "no host"),
            ("peerbus://x y", "no host"),
        ] {
            let error = text.parse::<BrokerUrl>().unwrap_err().to_string();
            assert!(error.contains(told), "{text}: {error}");
        }
        #[cfg(not(feature = "nats"))]
        assert!(
            "nats://x".parse::<BrokerUrl>().unwrap_err().to_string().contains("--features nats")
        );
    }
}
