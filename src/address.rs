//! Topics, patterns and service names: parsed once, at the edge.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::text::is_hidden;

use crate::identity::NodeId;

/// The longest topic, pattern or service name, in bytes.
pub const MAX_ADDRESS_LEN: usize = 255;

/// The most tokens of a topic, pattern or service name.
pub const MAX_TOKENS: usize = 32;

/// The error with which a topic, pattern, service name or mesh name was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AddressError {
    /// The text is empty.
    #[error("{what} is empty")]
    Empty {
        /// The kind of name: "topic", "pattern", "service name" or "mesh name".
        what: &'static str,
    },
    /// The text is longer than allowed.
    #[error("{what} is {len} bytes long; at most {max} are allowed")]
    TooLong {
        /// The kind of name.
        what: &'static str,
        /// The length in bytes.
        len: usize,
        /// The maximum length in bytes.
        max: usize,
    },
    /// The text has more tokens than allowed.
    #[error("{what} has {tokens} tokens; at most {MAX_TOKENS} are allowed")]
    TooManyTokens {
        /// The kind of name.
        what: &'static str,
        /// The number of tokens.
        tokens: usize,
    },
    /// Two dots stand side by side, or one at either end.
    #[error("{what} {text:?} has an empty token: no dot may stand first, last or beside another")]
    EmptyToken {
        /// The kind of name.
        what: &'static str,
        /// The text as given.
        text: String,
    },
    /// A character that is not allowed.
    #[error("{what} {text:?} has the character {found:?}; {allowed}")]
    Character {
        /// The kind of name.
        what: &'static str,
        /// The text as given.
        text: String,
        /// The first offending character.
        found: char,
        /// The allowed characters.
        allowed: &'static str,
    },
    /// `*` or `>` beside other characters, or `>` before the end.
    #[error(
        "pattern {text:?} has a misplaced wildcard: `*` stands for one whole token, `>` for the rest, at the end"
    )]
    Wildcard {
        /// The text as given.
        text: String,
    },
}

/// Lets a parsed value stand wherever text is accepted.
impl From<std::convert::Infallible> for AddressError {
    fn from(never: std::convert::Infallible) -> Self {
        match never {}
    }
}

const TOKENS: &str = "tokens may hold any visible character except blanks, `*`, `>` and `$`";

fn is_token_char(c: char) -> bool {
    !(c.is_whitespace() || is_hidden(c) || matches!(c, '*' | '>' | '$'))
}

/// Returns the first character that no token may hold. Most text is plain ASCII, whose bytes tell.
fn find_forbidden(text: &str) -> Option<char> {
    match text.bytes().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'*' | b'>' | b'$')) {
        true => None,
        false => text.chars().find(|c| *c != '.' && !is_token_char(*c)),
    }
}

fn check_len(what: &'static str, text: &str, max: usize) -> Result<(), AddressError> {
    if text.is_empty() {
        return Err(AddressError::Empty { what });
    }
    if text.len() > max {
        return Err(AddressError::TooLong { what, len: text.len(), max });
    }
    Ok(())
}

fn check_tokens(what: &'static str, text: &str) -> Result<(), AddressError> {
    check_len(what, text, MAX_ADDRESS_LEN)?;
    if let Some(found) = find_forbidden(text) {
        return Err(AddressError::Character { what, text: text.into(), found, allowed: TOKENS });
    }
    if text.split('.').any(str::is_empty) {
        return Err(AddressError::EmptyToken { what, text: text.into() });
    }
    check_count(what, text)
}

fn check_count(what: &'static str, text: &str) -> Result<(), AddressError> {
    match text.split('.').count() {
        tokens if tokens > MAX_TOKENS => Err(AddressError::TooManyTokens { what, tokens }),
        _ => Ok(()),
    }
}

/// Implements the common methods and conversions of a checked, cheaply cloned text.
macro_rules! checked_text {
    ($name:ident) => {
        impl $name {
            /// The text as given.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), self.0)
            }
        }
        impl FromStr for $name {
            type Err = AddressError;
            fn from_str(text: &str) -> Result<Self, AddressError> {
                Self::check(text)?;
                Ok(Self(text.into()))
            }
        }
        impl TryFrom<&str> for $name {
            type Error = AddressError;
            fn try_from(text: &str) -> Result<Self, AddressError> {
                text.parse()
            }
        }
        impl TryFrom<&String> for $name {
            type Error = AddressError;
            fn try_from(text: &String) -> Result<Self, AddressError> {
                text.parse()
            }
        }
        impl TryFrom<String> for $name {
            type Error = AddressError;
            fn try_from(text: String) -> Result<Self, AddressError> {
                text.parse()
            }
        }
        impl TryFrom<&$name> for $name {
            type Error = AddressError;
            fn try_from(text: &$name) -> Result<Self, AddressError> {
                Ok(text.clone())
            }
        }
    };
}

/// A publish-subscribe channel: dot-separated tokens, `orders.eu.placed`.
///
/// A topic has at most 255 bytes and 32 tokens. Tokens are not empty and hold no blanks, control
/// characters, `*`, `>` or `$`. Cloning is cheap.
///
/// ```
/// # use peerbus::Topic;
/// let topic: Topic = "orders.eu.placed".parse()?;
/// assert!("orders..placed".parse::<Topic>().is_err());
/// # Ok::<(), peerbus::AddressError>(())
/// ```
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Topic(Arc<str>);
checked_text!(Topic);

impl Topic {
    fn check(text: &str) -> Result<(), AddressError> {
        check_tokens("topic", text)
    }
}

/// A filter of topics, for subscriptions: `*` matches one token, and a `>` at the end matches one
/// or more.
///
/// ```
/// # use peerbus::{Pattern, Topic};
/// let pattern: Pattern = "orders.*.placed".parse()?;
/// assert!(pattern.matches(&"orders.eu.placed".parse()?));
/// assert!(!pattern.matches(&"orders.eu.north.placed".parse()?));
/// # Ok::<(), peerbus::AddressError>(())
/// ```
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Pattern(Arc<str>);
checked_text!(Pattern);

impl Pattern {
    fn check(text: &str) -> Result<(), AddressError> {
        let what = "pattern";
        check_len(what, text, MAX_ADDRESS_LEN)?;
        let mut tokens = text.split('.').peekable();
        while let Some(token) = tokens.next() {
            match token {
                "" => {
                    return Err(AddressError::EmptyToken { what, text: text.into() });
                }
                "*" => {}
                ">" if tokens.peek().is_none() => {}
                _ if token.contains(['*', '>']) => {
                    return Err(AddressError::Wildcard { text: text.into() });
                }
                _ => check_tokens(what, token)?,
            }
        }
        check_count(what, text)
    }

    /// Returns true if the pattern matches `topic`.
    pub fn matches(&self, topic: &Topic) -> bool {
        self.matches_text(&topic.0)
    }

    /// Returns true if the pattern matches `name`, a name of dotted tokens.
    pub(crate) fn matches_text(&self, name: &str) -> bool {
        let mut tokens = name.split('.');
        for want in self.0.split('.') {
            match (want, tokens.next()) {
                (">", Some(_)) => return true,
                ("*", Some(_)) => {}
                (want, Some(token)) if want == token => {}
                _ => return false,
            }
        }
        tokens.next().is_none()
    }
}

impl Pattern {
    /// Returns true if this pattern matches every topic that `other` matches.
    pub(crate) fn covers(&self, other: &Self) -> bool {
        let mut theirs = other.0.split('.');
        for ours in self.0.split('.') {
            match (ours, theirs.next()) {
                (">", Some(_)) => return true,
                ("*", Some(token)) if token != ">" => {}
                (ours, Some(token)) if ours == token => {}
                _ => return false,
            }
        }
        theirs.next().is_none()
    }
}

impl From<Topic> for Pattern {
    fn from(topic: Topic) -> Self {
        Self(topic.0)
    }
}

/// A point-to-point channel: each message goes to exactly one of the nodes that serve the name
/// (competing consumers). The rules are those of a [`Topic`].
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceName(Arc<str>);
checked_text!(ServiceName);

impl ServiceName {
    fn check(text: &str) -> Result<(), AddressError> {
        check_tokens("service name", text)
    }

    /// Returns true if the name is the mesh's own, and no user's.
    pub(crate) fn is_reserved(&self) -> bool {
        self.0.starts_with('$')
    }

    /// The name under which a node announces that it accepts messages addressed to itself. Users
    /// can't claim it, since `$` is not allowed in parsed names.
    pub(crate) fn node_inbox() -> Self {
        Self("$node".into())
    }

    /// Parses a name from the wire, where the node inbox's name is allowed too.
    pub(crate) fn from_wire(text: &str) -> Result<Self, AddressError> {
        if text == "$node" { Ok(Self::node_inbox()) } else { text.parse() }
    }
}

/// The name that separates meshes which share a network or a host; `default` unless set.
///
/// A name consists of 1 to 24 of the characters `a-z A-Z 0-9 - _`, since it is also a folder's name
/// and must leave room in the path of a Unix socket, which macOS limits to 104 bytes.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MeshName(Arc<str>);
checked_text!(MeshName);

impl MeshName {
    fn check(text: &str) -> Result<(), AddressError> {
        let what = "mesh name";
        check_len(what, text, 24)?;
        let bad = |c: &char| !(c.is_ascii_alphanumeric() || matches!(c, '-' | '_'));
        match text.chars().find(bad) {
            Some(found) => Err(AddressError::Character {
                what,
                text: text.into(),
                found,
                allowed: "letters, digits, `-` and `_` are allowed",
            }),
            None => Ok(()),
        }
    }
}

impl Default for MeshName {
    fn default() -> Self {
        Self("default".into())
    }
}

/// The destination of a message.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Destination {
    /// Every node with a matching subscription.
    Topic(Topic),
    /// One of the nodes that serve the name.
    Service(ServiceName),
    /// One node, by its id.
    Node(NodeId),
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Topic(topic) => topic.fmt(f),
            Self::Service(service) => service.fmt(f),
            Self::Node(node) => node.fmt(f),
        }
    }
}

/// The recipient of a one-way message or a request: a service, or one node by its id.
///
/// A plain string is the name of a service.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Recipient {
    /// One of the nodes that serve the name.
    Service(ServiceName),
    /// This node, if it accepts messages addressed to itself.
    Node(NodeId),
}

impl From<Recipient> for Destination {
    fn from(recipient: Recipient) -> Self {
        match recipient {
            Recipient::Service(service) => Self::Service(service),
            Recipient::Node(node) => Self::Node(node),
        }
    }
}

impl fmt::Display for Recipient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Service(service) => service.fmt(f),
            Self::Node(node) => node.fmt(f),
        }
    }
}

/// Conversion into a [`Recipient`].
pub trait IntoRecipient {
    /// Checks and converts the value.
    ///
    /// # Errors
    /// [`AddressError`] if the value is text that is not a valid service name.
    fn into_recipient(self) -> Result<Recipient, AddressError>;
}

impl IntoRecipient for Recipient {
    fn into_recipient(self) -> Result<Recipient, AddressError> {
        Ok(self)
    }
}
impl IntoRecipient for NodeId {
    fn into_recipient(self) -> Result<Recipient, AddressError> {
        Ok(Recipient::Node(self))
    }
}
impl IntoRecipient for &ServiceName {
    fn into_recipient(self) -> Result<Recipient, AddressError> {
        Ok(Recipient::Service(self.clone()))
    }
}
impl IntoRecipient for ServiceName {
    fn into_recipient(self) -> Result<Recipient, AddressError> {
        Ok(Recipient::Service(self))
    }
}
impl IntoRecipient for &str {
    fn into_recipient(self) -> Result<Recipient, AddressError> {
        Ok(Recipient::Service(self.parse()?))
    }
}
impl IntoRecipient for &String {
    fn into_recipient(self) -> Result<Recipient, AddressError> {
        self.as_str().into_recipient()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_whole_tokens() {
        let cases = [
            ("a.b", "a.b", true),
            ("a.b", "a.b.c", false),
            ("a.b", "a", false),
            ("a.*", "a.b", true),
            ("a.*", "a", false),
            ("a.*", "a.b.c", false),
            ("*.b", "a.b", true),
            ("a.>", "a.b.c", true),
            ("a.>", "a", false),
            (">", "a", true),
            (">", "a.b.c", true),
            ("a.*.>", "a.b.c", true),
            ("a.*.>", "a.b", false),
        ];
        for (pattern, topic, want) in cases {
            let pattern: Pattern = pattern.parse().unwrap();
            assert_eq!(pattern.matches(&topic.parse().unwrap()), want, "{pattern} {topic}");
        }
    }

    #[test]
    fn what_cannot_be_parsed_is_refused_with_a_reason() {
        for text in ["", ".", "a.", ".a", "a..b", "a b", "a.*", "a.>", "$node", "a\n"] {
            assert!(text.parse::<Topic>().is_err(), "{text:?}");
            assert!(text.parse::<ServiceName>().is_err(), "{text:?}");
        }
        for text in ["", "a.", "a*.b", "a.>.b", "a.b>", "a. .b", "$x.*"] {
            assert!(text.parse::<Pattern>().is_err(), "{text:?}");
        }
        let long = "a".repeat(MAX_ADDRESS_LEN + 1);
        let error = long.parse::<Topic>().unwrap_err();
        assert_eq!(error.to_string(), "topic is 256 bytes long; at most 255 are allowed");
        let deep = ["a"; MAX_TOKENS + 1].join(".");
        assert!(deep.parse::<Topic>().is_err() && deep.parse::<Pattern>().is_err());
        assert!(deep[2..].parse::<Topic>().is_ok() && deep[2..].parse::<Pattern>().is_ok());
        assert!("../x".parse::<MeshName>().is_err());
        assert!("a".repeat(25).parse::<MeshName>().is_err());
    }
}
