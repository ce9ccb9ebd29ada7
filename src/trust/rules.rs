//! Rules: which peers may publish, subscribe, send and serve which names.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use serde::Serialize;

use super::trusted_keys::{Trusted, TrustedKeys};
use super::{Trust, Watched};
use crate::address::{AddressError, Pattern};
use crate::identity::{NodeId, NodeIdError};
use crate::private::{self, Others};

/// An action on a topic or a service that a rule can allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Action {
    /// Publish events on a topic.
    Publish,
    /// Receive the events of a topic.
    Subscribe,
    /// Send commands and requests to a service. Messages to a node itself need the pattern `>`.
    Send,
    /// Offer a service.
    Serve,
}

impl Action {
    const ALL: [Self; 4] = [Self::Publish, Self::Subscribe, Self::Send, Self::Serve];

    /// The name used in rules.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Publish => "publish",
            Self::Subscribe => "subscribe",
            Self::Send => "send",
            Self::Serve => "serve",
        }
    }

    pub(crate) fn code(self) -> u64 {
        self as u64
    }

    pub(crate) fn from_code(code: u64) -> Option<Self> {
        Self::ALL.into_iter().find(|action| action.code() == code)
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The permissions of peers over a network. An action that no rule allows is refused.
///
/// Each line is one rule: a subject, an action, and a pattern of topics or services, in which `*`
/// matches one token and a `>` at the end one or more; names that begin with `$` are the mesh's own,
/// and no pattern reaches them. The subject is a name or a role from the
/// file of trusted keys, a node id, or `*` for every peer. The action `*` means all four.
///
/// ```
/// let rules: peerbus::Rules = "
///     ## subject action    pattern
///     tills     publish    orders.>
///     billing   subscribe  orders.*
///     billing   serve      invoices
///     *         send       stock.>
/// ".parse()?;
/// # Ok::<(), peerbus::ParseRulesError>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rules(Vec<Rule>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Rule {
    who: Who,
    /// The action; `None` is any.
    action: Option<Action>,
    pattern: Pattern,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Who {
    Anybody,
    Node(NodeId),
    Named(String),
}

/// An invalid line of rules.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {reason}")]
#[non_exhaustive]
pub struct ParseRulesError {
    /// The line's number, from 1.
    pub line: usize,
    /// The fault of the line.
    pub reason: String,
}

/// A rules file that can't be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RulesError {
    /// The file can't be read, or other users can change it.
    #[error("rules {path}: {source}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A line is invalid.
    #[error("rules {path}, {source}", path = path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// The line, and its fault.
        source: ParseRulesError,
    },
    /// A rule can bind nobody in the node's trust mode.
    #[error("rules {path}: {source}", path = path.display())]
    Subject {
        /// The file.
        path: PathBuf,
        /// The subject, and why it means nobody.
        source: SubjectError,
    },
}

/// A rule whose subject means nobody that the node's settings let in, so that it would not protect
/// anything.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SubjectError {
    /// In the mode [`Trust::Open`] any peer can claim any id.
    #[error(
        "the rule for {0} protects nothing, since peers don't prove their ids in the trust mode \
         open; use * as subject, or a mesh key or trusted keys"
    )]
    Unproven(NodeId),
    /// In the mode [`Trust::ThisHost`] all peers are processes of the same user, which over the
    /// sockets of this host are bound by no rule.
    #[error(
        "the rules would bind nobody: the trust mode this-host accepts only processes of this user, \
         which rules don't bind; give a mesh key (--mesh-key-file) or trusted keys (--trusted-keys), \
         or no rules"
    )]
    SameUser,
    /// Names and roles exist in the mode [`Trust::TrustedKeys`] only.
    #[error(
        "the rule for {name:?} means nobody, since names and roles come from a file of trusted keys \
         (--trusted-keys), and the trust mode is {mode}; use {use_instead} as subject"
    )]
    Nameless {
        /// The name or role.
        name: String,
        /// The node's trust mode.
        mode: &'static str,
        /// Subjects that have a meaning in this mode.
        use_instead: &'static str,
    },
}

/// The rules of a configuration.
#[derive(Debug, Clone)]
pub(crate) enum RulesSource {
    Given(Rules),
    File(PathBuf),
}

impl RulesSource {
    /// Loads the rules. Those of a file are loaded again when it changes.
    ///
    /// With `local`, the node has sockets for this host.
    pub(super) fn open(&self, trust: &Trust, local: bool) -> Result<Watched<Rules>, RulesError> {
        match self {
            Self::Given(rules) => Ok(rules.clone().into()),
            Self::File(path) => {
                let trust = trust.clone();
                Watched::open(path, move |path| {
                    let rules = Rules::load(path)?;
                    let wrong = |source| RulesError::Subject { path: path.into(), source };
                    rules.check(&trust, local).map_err(wrong)?;
                    Ok(rules)
                })
            }
        }
    }
}

impl Rules {
    /// Loads rules from a file.
    ///
    /// # Errors
    /// [`RulesError`] if the file can't be read, other users can change it, or a line is invalid.
    pub fn load(path: &Path) -> Result<Self, RulesError> {
        let text = private::read(path, Others::MayRead)
            .map_err(|source| RulesError::File { path: path.into(), source })?;
        text.parse().map_err(|source| RulesError::Parse { path: path.into(), source })
    }

    /// Refuses subjects that mean nobody in a trust mode; with `local`, the node has sockets for this
    /// host.
    pub(crate) fn check(&self, trust: &Trust, local: bool) -> Result<(), SubjectError> {
        if local && matches!(trust, Trust::ThisHost) {
            return Err(SubjectError::SameUser);
        }
        self.0.iter().try_for_each(|rule| match (&rule.who, trust) {
            (Who::Node(id), Trust::Open { .. }) => Err(SubjectError::Unproven(*id)),
            (Who::Named(_), Trust::TrustedKeys(_)) => Ok(()),
            (Who::Named(name), _) => {
                let is_open = matches!(trust, Trust::Open { .. });
                let use_instead = if is_open { "*" } else { "a node id or *" };
                Err(SubjectError::Nameless {
                    name: name.clone(),
                    mode: trust.as_str(),
                    use_instead,
                })
            }
            (Who::Anybody | Who::Node(_), _) => Ok(()),
        })
    }

    /// The subjects that mean nobody, since no trusted key has such a name or role.
    pub(crate) fn unknown_to(&self, keys: &TrustedKeys) -> Vec<&str> {
        let named = self.0.iter().filter_map(|rule| match &rule.who {
            Who::Named(name) => Some(name.as_str()),
            Who::Anybody | Who::Node(_) => None,
        });
        let mut unknown: Vec<&str> = named.filter(|name| !keys.knows(name)).collect();
        unknown.sort_unstable();
        unknown.dedup();
        unknown
    }

    /// The permissions of a node; `trusted` is its entry among the trusted keys.
    pub(crate) fn grants(&self, id: &NodeId, trusted: Option<&Trusted>) -> Grants {
        let is_meant = |rule: &&Rule| match &rule.who {
            Who::Anybody => true,
            Who::Node(node) => node == id,
            Who::Named(name) => trusted.is_some_and(|it| it.name == *name || it.has_role(name)),
        };
        let granted = self.0.iter().filter(is_meant);
        Grants::These(granted.map(|rule| (rule.action, rule.pattern.clone())).collect())
    }
}

impl FromStr for Rules {
    type Err = ParseRulesError;

    fn from_str(text: &str) -> Result<Self, ParseRulesError> {
        let mut rules = Vec::new();
        for (number, line) in text.lines().enumerate() {
            let line = line.split('#').next().unwrap_or_default();
            if !line.trim().is_empty() {
                let wrong = |reason| ParseRulesError { line: number + 1, reason };
                rules.push(line.parse().map_err(wrong)?);
            }
        }
        Ok(Self(rules))
    }
}

impl FromStr for Rule {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [who, action, pattern] = fields[..] else {
            return Err("expected a subject, an action and a pattern".into());
        };
        let who = match who {
            "*" => Who::Anybody,
            name => match name.parse() {
                Ok(id) => Who::Node(id),
                Err(error @ NodeIdError::SmallOrder) => return Err(error.to_string()),
                Err(_) => Who::Named(name.to_owned()),
            },
        };
        let action =
            match action {
                "*" => None,
                name => Some(Action::ALL.into_iter().find(|it| it.as_str() == name).ok_or_else(
                    || format!("{name:?} is none of publish, subscribe, send, serve and *"),
                )?),
            };
        let pattern = pattern.parse().map_err(|error: AddressError| error.to_string())?;
        Ok(Self { who, action, pattern })
    }
}

/// The permissions of one peer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) enum Grants {
    #[default]
    Everything,
    These(Arc<[(Option<Action>, Pattern)]>),
}

impl Grants {
    pub(crate) fn nothing() -> Self {
        Self::These(Arc::default())
    }

    /// Returns true if the action on that topic or service is allowed.
    pub(crate) fn permit(&self, action: Action, name: &str) -> bool {
        // Wildcards don't reach the mesh's own names, and no pattern can spell them out.
        self.any(action, |pattern| !name.starts_with('$') && pattern.matches_text(name))
    }

    /// Returns true if sending to the node itself is allowed, which requires the right to send to
    /// every service.
    pub(crate) fn permit_node(&self) -> bool {
        self.any(Action::Send, |pattern| pattern.as_str() == ">")
    }

    /// Returns true if the action is allowed on every name that `wanted` matches.
    pub(crate) fn permit_all(&self, action: Action, wanted: &Pattern) -> bool {
        self.any(action, |pattern| pattern.covers(wanted))
    }

    /// Returns true if no rule allows the peer anything.
    pub(crate) fn allow_nothing(&self) -> bool {
        matches!(self, Self::These(granted) if granted.is_empty())
    }

    fn any(&self, action: Action, fits: impl Fn(&Pattern) -> bool) -> bool {
        match self {
            Self::Everything => true,
            Self::These(granted) => granted
                .iter()
                .any(|(granted, pattern)| granted.is_none_or(|it| it == action) && fits(pattern)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn till() -> Trusted {
        Trusted { name: "till-1".into(), roles: vec!["tills".into()] }
    }

    #[test]
    fn a_rule_grants_an_action_on_a_pattern_to_a_name_a_role_or_a_key() {
        let id = NodeId::from_bytes([1; 32]);
        let rules = format!(
            "tills publish orders.> # at the counter\n\ntill-1 serve drawer.*\n{id} * lab\n* send stock"
        );
        let rules: Rules = rules.parse().unwrap();
        let (till, nobody) = (rules.grants(&id, Some(&till())), NodeId::from_bytes([2; 32]));
        assert!(till.permit(Action::Publish, "orders.eu.new"));
        assert!(!till.permit(Action::Publish, "orders"));
        assert!(!till.permit(Action::Subscribe, "orders.eu.new"));
        assert!(till.permit(Action::Serve, "drawer.1"));
        assert!(till.permit(Action::Subscribe, "lab") && till.permit(Action::Serve, "lab"));
        let nobody = rules.grants(&nobody, None);
        assert!(nobody.permit(Action::Send, "stock"));
        assert!(!nobody.permit(Action::Publish, "orders.eu.new"));
        assert!(!Rules::default().grants(&id, None).permit(Action::Send, "stock"));
    }

    #[test]
    fn a_pattern_is_granted_only_if_all_of_it_is() {
        let rules: Rules = "* subscribe orders.*.new\n* subscribe news.>".parse().unwrap();
        let grants = rules.grants(&NodeId::from_bytes([1; 32]), None);
        let may = |wanted: &str| grants.permit_all(Action::Subscribe, &wanted.parse().unwrap());
        let granted = ["orders.eu.new", "orders.*.new", "news.a", "news.*", "news.>", "news.a.>"];
        assert!(granted.into_iter().all(may));
        let refused = [">", "*", "orders.*.*", "orders.>", "orders.eu", "news", "orders.eu.new.>"];
        assert!(!refused.into_iter().any(may));
    }

    #[test]
    fn wildcards_do_not_reach_the_names_of_the_mesh_itself() {
        let id = NodeId::from_bytes([1; 32]);
        for rules in ["* * >", "* send *"] {
            let grants = rules.parse::<Rules>().unwrap().grants(&id, None);
            assert!(grants.permit(Action::Send, "stock"));
            assert!(!grants.permit(Action::Send, "$node"), "{rules}");
        }
        assert!("* send $node".parse::<Rules>().is_err());
    }

    #[test]
    fn a_name_that_no_trusted_key_has_is_known_as_such() {
        let rules: Rules = "till-1 send a\ntills send a\ntils send a\n* send a".parse().unwrap();
        let id = NodeId::from_bytes([1; 32]);
        let keys = TrustedKeys::parse(&format!("till-1 {id} tills")).unwrap();
        assert_eq!(rules.unknown_to(&keys), ["tils"]);
    }

    #[test]
    fn what_makes_no_sense_is_named_by_its_line() {
        for (text, line, reason) in [
            ("tills publish", 1, "expected a subject"),
            ("\n\na b c d", 3, "expected a subject"),
            ("# fine\n* read orders", 2, "none of publish"),
            ("* send a..b", 1, "empty token"),
            (&format!("{} send a", NodeId::BROKER), 1, "small order"),
        ] {
            let error = text.parse::<Rules>().unwrap_err();
            assert_eq!(error.line, line, "{text}");
            assert!(error.reason.contains(reason), "{error}");
        }
    }
}
