//! Secrets on their way to a command: by a file, by the environment, or by the command line, which
//! other users of the host can read.

use std::path::Path;

use anyhow::{Context, bail};
use peerbus::{Credentials, Secret};

use crate::output;

/// The environment variable with credentials for the broker.
const CREDENTIALS: &str = "PEERBUS_BROKER_CREDENTIALS";

/// The credentials for the broker, from a file or the environment.
pub(crate) fn credentials(file: Option<&Path>) -> anyhow::Result<Option<Credentials>> {
    let given = std::env::var(CREDENTIALS).ok().filter(|text| !text.is_empty());
    Ok(match (file, given) {
        (Some(_), Some(_)) => bail!(
            "a credentials file for the broker is given, and {CREDENTIALS} is set; leave out one of \
             the two"
        ),
        (Some(path), None) => Some(Credentials::load(path)?),
        (None, Some(text)) => Some(text.parse().context(CREDENTIALS)?),
        (None, None) => None,
    })
}

/// The address of a broker from the environment variable `name`, with the credentials that are given
/// apart from it.
pub(crate) fn broker_from_env(name: &str) -> anyhow::Result<Secret> {
    let url = std::env::var(name).with_context(|| format!("{name} is not set"))?;
    let file = std::env::var_os("PEERBUS_BROKER_CREDENTIALS_FILE");
    let Some(credentials) = credentials(file.as_deref().map(Path::new))? else {
        return Ok(url.into());
    };
    let url: peerbus::BrokerUrl = url.parse()?;
    Ok(url.with_credentials(credentials)?.reveal().into())
}

/// Warns if a secret is an argument of this command.
pub(crate) fn warn_if_on_command_line(secret: &Secret, instead: &str) {
    let is_there = |arg: std::ffi::OsString| arg.to_string_lossy().contains(secret.reveal());
    if std::env::args_os().skip(1).any(is_there) {
        output::note(format_args!(
            "peerbus: other users of this host can read the secret on the command line; give it by \
             {instead} or the environment"
        ));
    }
}
