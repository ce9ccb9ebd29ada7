//! Text of others, made safe to look at.
//!
//! A body, a name or an error of a peer may hold escape sequences that control a terminal, line
//! breaks that forge a line of a log, and invisible or bidirectional characters that make text look
//! like another. The wrappers here show such characters as escapes, and leave all others alone:
//!
//! ```
//! use peerbus::text::{Line, Lines};
//!
//! let name = "b\u{fc}ro\u{1b}[2J\u{202e}gnp.exe\nforged line";
//! assert_eq!(Line(name).to_string(), r"büro\u{1b}[2J\u{202e}gnp.exe\nforged line");
//! assert_eq!(Lines("two\nlines\r").to_string(), "two\nlines\\r");
//! ```
//!
//! `Display` of this crate's own errors and events uses them already.

use std::fmt::{self, Display, Write};

/// Shows text on one line: line breaks and tabs are escaped too.
#[derive(Debug, Clone, Copy)]
pub struct Line<T>(pub T);

/// Shows text that may have several lines: line feeds and tabs stay.
#[derive(Debug, Clone, Copy)]
pub struct Lines<T>(pub T);

/// Shows JSON: the escapes are those of JSON (RFC 8259, section 7), so its value stays the same.
#[derive(Debug, Clone, Copy)]
pub struct Json<T>(pub T);

impl<T: Display> Display for Line<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(Escaping { to: f, style: Style::Line, before: None }, "{}", self.0)
    }
}

impl<T: Display> Display for Lines<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(Escaping { to: f, style: Style::Lines, before: None }, "{}", self.0)
    }
}

impl<T: Display> Display for Json<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(Escaping { to: f, style: Style::Json, before: None }, "{}", self.0)
    }
}

/// Returns the beginning of a text, of at most so many bytes.
pub(crate) fn shorten(text: &str, most: usize) -> &str {
    let mut end = text.len().min(most);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// Returns text of others on one line, cut to `most` characters.
pub(crate) fn clean(text: &str, most: usize) -> String {
    match text.chars().count() <= most {
        true => Line(text).to_string(),
        false => format!("{}…", Line(text.chars().take(most).collect::<String>())),
    }
}

/// Returns true if a text needs no escapes.
pub(crate) fn is_visible(text: &str) -> bool {
    Line(text).to_string() == text
}

/// Returns true for characters that control a terminal or a line, or that can't be seen.
///
/// These are the control characters, the line separators, and what Unicode says to ignore in
/// display (`Default_Ignorable_Code_Point`), among it all that is bidirectional or of no width.
pub(crate) fn is_hidden(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}'..='\u{1160}' | '\u{17b4}'..='\u{17b5}'
            | '\u{180b}'..='\u{180f}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{3164}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}'
            | '\u{ffa0}' | '\u{fff0}'..='\u{fffb}' | '\u{1bca0}'..='\u{1bca3}'
            | '\u{1d173}'..='\u{1d17a}' | '\u{e0000}'..='\u{e0fff}')
}

/// Returns true for hidden characters that make one sign of those around them: the joiner and the
/// variants of emoji.
fn joins(before: Option<char>, c: char) -> bool {
    let is_sign = |c| matches!(c, '\u{2190}'..='\u{2bff}' | '\u{1f000}'..='\u{1faff}' | '\u{fe0f}');
    match c {
        '\u{200d}' => before.is_some_and(is_sign),
        '\u{fe0e}' | '\u{fe0f}' => before.is_some_and(|before| before != c && !is_hidden(before)),
        _ => false,
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Style {
    Line,
    Lines,
    Json,
}

/// Writes text with its hidden characters escaped.
struct Escaping<'a, 'f> {
    to: &'a mut fmt::Formatter<'f>,
    style: Style,
    before: Option<char>,
}

impl Write for Escaping<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut written = 0;
        for (place, c) in text.char_indices() {
            let before = self.before.replace(c);
            let stays = self.style != Style::Line && matches!(c, '\n' | '\t');
            if stays || !is_hidden(c) || joins(before, c) {
                continue;
            }
            self.to.write_str(&text[written..place])?;
            written = place + c.len_utf8();
            match self.style {
                Style::Line | Style::Lines => write!(self.to, "{}", c.escape_default())?,
                Style::Json => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        write!(self.to, "\\u{unit:04x}")?;
                    }
                }
            }
        }
        self.to.write_str(&text[written..])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_all_languages_and_emoji_stay_as_they_are() {
        for text in ["Grüße, 日本語, עברית, العربية", "👩🏽‍🚀 👨‍👩‍👧 ❤️ 🇩🇪 ☎︎", "a\\b \"c\" ’"]
        {
            assert_eq!(Line(text).to_string(), text);
        }
    }

    #[test]
    fn characters_that_control_hide_or_reorder_are_shown_as_escapes() {
        for (text, shown) in [
            ("\u{1b}]0;pwned\u{7}", r"\u{1b}]0;pwned\u{7}"),
            ("a\r\nb\tc", r"a\r\nb\tc"),
            ("\u{9b}31m\u{7f}", r"\u{9b}31m\u{7f}"),
            ("bob\u{202e}gnp.exe\u{2066}", r"bob\u{202e}gnp.exe\u{2066}"),
            ("a\u{200b}b\u{200d}c\u{feff}", r"a\u{200b}b\u{200d}c\u{feff}"),
            ("a\u{2028}b\u{2029}", r"a\u{2028}b\u{2029}"),
            ("\u{e0041}\u{fe01}\u{fe0f}", r"\u{e0041}\u{fe01}\u{fe0f}"),
        ] {
            assert_eq!(Line(text).to_string(), shown);
        }
        assert_eq!(Lines("a\n\tb\r\u{1b}").to_string(), "a\n\tb\\r\\u{1b}");
    }

    #[test]
    fn json_keeps_its_value() {
        let text = "\"a\u{9b}b\u{202e}c\u{e0041}\"";
        let shown = Json(text).to_string();
        assert!(shown.is_ascii(), "{shown}");
        let (before, after): (String, String) =
            (serde_json::from_str(text).unwrap(), serde_json::from_str(&shown).unwrap());
        assert_eq!(before, after);
    }

    #[test]
    fn long_text_is_cut_and_what_is_left_is_clean() {
        assert_eq!(clean("abc", 3), "abc");
        assert_eq!(clean("ab\u{1b}d", 3), r"ab\u{1b}…");
    }
}
