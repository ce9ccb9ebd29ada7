//! The credentials by which a broker knows its users.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::private::{self, Others};
use crate::secret::Secret;

/// The credentials for a broker: a user and a password, or a token (NATS).
///
/// The text form is `USER:PASSWORD` or `TOKEN`, in which nothing is escaped: the first colon ends the
/// user's name, and a token has none. `Debug` shows neither, and no error does.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials(pub(super) Kind);

#[derive(Clone, PartialEq, Eq)]
pub(super) enum Kind {
    User { name: String, password: Secret },
    Token(Secret),
}

/// A text, or a file, that holds no credentials.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CredentialsError {
    /// The text is not one line of credentials.
    #[error("not credentials: expected one line, USER:PASSWORD or TOKEN")]
    Format,
    /// The file holds no credentials.
    #[error("credentials file {path}: expected one line, USER:PASSWORD or TOKEN", path = path.display())]
    FileFormat {
        /// The file.
        path: PathBuf,
    },
    /// The file can't be read, or other users can read or replace it.
    #[error("credentials file {path}: {source}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

impl Credentials {
    /// A user and a password.
    pub fn user(name: impl Into<String>, password: impl Into<Secret>) -> Self {
        Self(Kind::User { name: name.into(), password: password.into() })
    }

    /// A token.
    pub fn token(token: impl Into<Secret>) -> Self {
        Self(Kind::Token(token.into()))
    }

    /// The name and the password of a user; `None` for a token.
    pub fn as_user(&self) -> Option<(&str, &Secret)> {
        match &self.0 {
            Kind::User { name, password } => Some((name, password)),
            Kind::Token(_) => None,
        }
    }

    /// Loads the credentials of a file, which is one line in the text form. Other users must not be
    /// able to read it.
    ///
    /// # Errors
    /// [`CredentialsError`] if the file can't be read, other users can read or replace it, or it
    /// holds anything else.
    pub fn load(path: &Path) -> Result<Self, CredentialsError> {
        let text = private::read(path, Others::Excluded)
            .map_err(|source| CredentialsError::File { path: path.into(), source })?;
        text.parse().map_err(|_| CredentialsError::FileFormat { path: path.into() })
    }

    /// The credentials in the userinfo of a URL (RFC 3986).
    pub(super) fn from_userinfo(userinfo: &str) -> Self {
        match userinfo.split_once(':') {
            Some((name, password)) => Self::user(unescaped(name), unescaped(password)),
            None => Self::token(unescaped(userinfo)),
        }
    }

    /// The userinfo of a URL (RFC 3986).
    pub(super) fn to_userinfo(&self) -> String {
        match &self.0 {
            Kind::User { name, password } => {
                format!("{}:{}", escaped(name), escaped(password.reveal()))
            }
            Kind::Token(token) => escaped(token.reveal()),
        }
    }
}

impl FromStr for Credentials {
    type Err = CredentialsError;

    fn from_str(text: &str) -> Result<Self, CredentialsError> {
        let line = text.strip_suffix('\n').unwrap_or(text);
        let line = line.strip_suffix('\r').unwrap_or(line);
        if line.is_empty() || line.chars().any(char::is_control) {
            return Err(CredentialsError::Format);
        }
        Ok(match line.split_once(':') {
            Some((name, password)) => Self::user(name, password),
            None => Self::token(line),
        })
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Kind::User { .. } => "Credentials(user …)",
            Kind::Token(_) => "Credentials(token …)",
        })
    }
}

/// Escapes all but unreserved characters (RFC 3986, 2.1).
fn escaped(text: &str) -> String {
    let escape = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
            char::from(byte).to_string()
        }
        _ => format!("%{byte:02X}"),
    };
    text.bytes().map(escape).collect()
}

fn unescaped(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let digits = after.get(..2).filter(|_| *first == b'%');
        let byte = digits
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok());
        bytes.push(byte.unwrap_or(*first));
        rest = if byte.is_some() { &after[2..] } else { after };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_survive_a_url_and_are_never_shown() {
        for text in ["me:hunter2", "me:h@u/n:t?e#r %41 é", "t0ken"] {
            let credentials: Credentials = text.parse().unwrap();
            let userinfo = credentials.to_userinfo();
            assert_eq!(Credentials::from_userinfo(&userinfo), credentials);
            assert!(!userinfo.contains(['@', '/', '?', '#', ' ']), "{userinfo}");
            let shown = format!("{credentials:?}");
            assert!(!shown.contains("hunter2") && !shown.contains("t0ken"), "{shown}");
        }
        assert_eq!(unescaped("100%"), "100%");
        assert_eq!(unescaped("a%2Fb%zz"), "a/b%zz");
    }

    #[test]
    fn a_file_has_one_line_that_no_error_shows() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("credentials");
        private::create_file(&path, "me:hunter2\n").unwrap();
        assert_eq!(Credentials::load(&path).unwrap(), Credentials::user("me", "hunter2"));
        let two = dir.path().join("two");
        private::create_file(&two, "me:hunter2\nyou:hunter3\n").unwrap();
        let error = Credentials::load(&two).unwrap_err();
        assert!(matches!(error, CredentialsError::FileFormat { .. }));
        assert!(!format!("{error} {error:?}").contains("hunter"));
    }

    #[cfg(unix)]
    #[test]
    fn a_file_that_others_can_read_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("credentials");
        private::create_file(&path, "me:hunter2\n").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        let error = Credentials::load(&path).unwrap_err().to_string();
        assert!(error.contains("chmod 600"), "{error}");
    }
}
