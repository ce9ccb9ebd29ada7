//! The addresses of brokers.

use std::fmt;
use std::str::FromStr;

use super::adapter::{ADAPTERS, Adapter};
use super::credentials::{Credentials, Kind};
use super::kind::BrokerKind;
use crate::secret::Secret;

/// A broker's address: `peerbus://HOST:PORT` for `peerbus broker`, `nats://` or `tls://` for NATS,
/// `amqp://` or `amqps://` for RabbitMQ. It may have credentials before the host, `USER:PASSWORD@`
/// or `TOKEN@`, escaped as in RFC 3986.
///
/// `Display` and `Debug` show neither credentials nor the query.
#[derive(Clone, PartialEq, Eq)]
pub struct BrokerUrl {
    kind: BrokerKind,
    scheme: String,
    host: String,
    port: u16,
    /// The path and the query, as they were written.
    path: String,
    query: Secret,
    credentials: Option<Credentials>,
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
        /// The scheme; empty if there is none.
        found: String,
    },
    /// There are credentials for a broker that knows no users.
    #[error("{kind} knows no users; leave out the credentials")]
    NoUsers {
        /// The kind of broker.
        kind: BrokerKind,
    },
    /// There is a token for a broker that wants a user and a password.
    #[error("{kind} knows no tokens; give USER:PASSWORD")]
    NoTokens {
        /// The kind of broker.
        kind: BrokerKind,
    },
    /// The address has credentials, and others are given besides.
    #[error("the broker's address has credentials, and others are given; leave out one of the two")]
    TwoCredentials,
    /// The rest of the text is not a host and port.
    #[error(
        "the broker's address has no host, or an invalid port; write {scheme}://HOST:PORT, and escape \
         @, /, ? and # in a password (%40, %2F, %3F, %23)"
    )]
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

    /// Adds the credentials by which the broker knows this node.
    ///
    /// # Errors
    /// [`BrokerUrlError`] if the address has some already, or the broker can't use these.
    pub fn with_credentials(mut self, credentials: Credentials) -> Result<Self, BrokerUrlError> {
        if self.credentials.is_some() {
            return Err(BrokerUrlError::TwoCredentials);
        }
        self.credentials = Some(credentials);
        self.checked()
    }

    /// The whole address, with credentials. Whoever prints it reveals them.
    pub fn reveal(&self) -> String {
        let Self { scheme, path, query, .. } = self;
        let userinfo = self.credentials.as_ref().map(|it| it.to_userinfo() + "@");
        let userinfo = userinfo.unwrap_or_default();
        format!("{scheme}://{userinfo}{}{path}{}", self.authority(), query.reveal())
    }

    /// The address without credentials, for a client that may print it.
    #[cfg(any(feature = "rabbitmq", test))]
    pub(super) fn bare(&self) -> String {
        Self { credentials: None, ..self.clone() }.reveal()
    }

    /// The credentials, if there are any.
    pub fn credentials(&self) -> Option<&Credentials> {
        self.credentials.as_ref()
    }

    fn authority(&self) -> String {
        match self.host.contains(':') {
            true => format!("[{}]:{}", self.host, self.port),
            false => format!("{}:{}", self.host, self.port),
        }
    }

    fn checked(self) -> Result<Self, BrokerUrlError> {
        let kind = self.kind;
        match (&self.credentials, kind) {
            (Some(_), BrokerKind::Embedded) => Err(BrokerUrlError::NoUsers { kind }),
            (Some(Credentials(Kind::Token(_))), BrokerKind::RabbitMq) => {
                Err(BrokerUrlError::NoTokens { kind })
            }
            _ => Ok(self),
        }
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
        // Without a scheme, the text may begin with a secret.
        let (scheme, rest) = text.split_once("://").unwrap_or_default();
        let of_scheme = |adapter: &&Adapter| adapter.port(scheme).is_some();
        let Some(adapter) = ADAPTERS.iter().find(of_scheme) else {
            let is_scheme = |c: char| c.is_ascii_alphanumeric() || "+-.".contains(c);
            let found = if scheme.chars().all(is_scheme) { scheme } else { "" };
            return Err(BrokerUrlError::Scheme { found: found.into() });
        };
        let (kind, usual_port) = (adapter.kind, adapter.port(scheme).unwrap_or_default());
        let bad = || BrokerUrlError::Host { scheme: scheme.into() };
        let (authority, rest) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
        // An unescaped password with one of these characters would pass as something else.
        if rest.contains(['@', '#']) {
            return Err(bad());
        }
        let (path, query) = rest.split_at(rest.find('?').unwrap_or(rest.len()));
        let (userinfo, address) = match authority.rsplit_once('@') {
            Some((userinfo, address)) => (Some(userinfo), address),
            None => (None, authority),
        };
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
        let credentials = userinfo.filter(|it| !it.is_empty()).map(Credentials::from_userinfo);
        let (scheme, host, path) = (scheme.into(), host.into(), path.into());
        Self { kind, scheme, host, port, path, query: query.into(), credentials }.checked()
    }
}

impl fmt::Display for BrokerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}{}", self.scheme, self.authority(), self.path)
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
    fn credentials_and_query_are_never_shown() {
        for (text, shown) in [
            ("nats://me:hunter2@example:4222", "nats://example:4222"),
            ("nats://hunter2@example", "nats://example:4222"),
            ("tls://me:hunter2%40%2F@example", "tls://example:4222"),
            ("nats://example:1?token=hunter2", "nats://example:1"),
            ("amqps://me:hunter2@[::1]/%2f?heartbeat=5&password=hunter2", "amqps://[::1]:5671/%2f"),
        ] {
            let url: BrokerUrl = text.parse().unwrap();
            assert_eq!(url.to_string(), shown);
            assert_eq!(format!("{url:?}"), format!("BrokerUrl({shown})"));
            let again: BrokerUrl = url.reveal().parse().unwrap();
            assert!(again == url, "{url} is another after it was written and read");
            assert!(!url.bare().contains("me:"), "{}", url.bare());
        }
        let url: BrokerUrl = "nats://example".parse().unwrap();
        let with = url.with_credentials(Credentials::user("me", "h@nter2")).unwrap();
        assert_eq!(with.reveal(), "nats://me:h%40nter2@example:4222");
        let twice = with.with_credentials(Credentials::token("x"));
        assert_eq!(twice.unwrap_err(), BrokerUrlError::TwoCredentials);
    }

    #[test]
    fn credentials_that_a_broker_cant_use_are_refused() {
        let error = "peerbus://me:hunter2@x".parse::<BrokerUrl>().unwrap_err();
        assert!(matches!(error, BrokerUrlError::NoUsers { .. }), "{error}");
        #[cfg(feature = "rabbitmq")]
        assert!(
            "amqp://t0ken@x".parse::<BrokerUrl>().unwrap_err().to_string().contains("no tokens")
        );
    }

    #[test]
    fn a_wrong_address_is_refused_without_repeating_a_secret() {
        for text in [
            "me:hunter2@example",
            "hunter2@example:4222",
            "hunter2",
            "me:hunter2@x://y",
            "peerbus://me:1/hunter2@example",
            "peerbus://me:1?hunter2@example",
            "peerbus://me:1#hunter2@example",
            "peerbus://me:hunter2/@example",
        ] {
            let error = text.parse::<BrokerUrl>().unwrap_err();
            assert!(!format!("{error} {error:?}").contains("hunter2"), "{error}");
        }
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
