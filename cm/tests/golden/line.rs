//! A line of a recording: a command, its fields, its result and, behind the arrow, what the kernel stored.

use std::net::{IpAddr, SocketAddr};

use verbs_abi::proto::cm::{Address, IbAddress};

/// A line, taken apart.
#[derive(Clone, Debug)]
pub(crate) struct Line {
    pub(crate) text: String,
    pub(crate) command: String,
    asked: Vec<(String, String)>,
    told: Vec<(String, String)>,
    /// The word behind the arrow that has no name, such as the kind of an event.
    pub(crate) word: String,
    pub(crate) ok: bool,
}

impl Line {
    pub(crate) fn parse(text: &str) -> Line {
        let (text_body, result) = text.rsplit_once(" = ").expect("a line has a result");
        let (asked, told) = text_body.split_once(" -> ").unwrap_or((text_body, ""));
        // What QUERY asks for stands before the arrow without a name.
        let word = match asked.rsplit_once(' ') {
            Some((_, word)) if !word.contains('=') => word,
            _ => told.split(' ').next().unwrap_or_default(),
        };
        Line {
            text: text.to_owned(),
            command: asked.split(' ').next().unwrap_or_default().to_owned(),
            asked: fields(asked, ""),
            told: fields(told, ""),
            word: word.to_owned(),
            ok: result == "ok",
        }
    }

    /// A field of the command.
    pub(crate) fn ask(&self, name: &str) -> &str {
        find(&self.asked, name).unwrap_or_else(|| panic!("no {name} in {}", self.text))
    }

    /// A number of the command.
    pub(crate) fn number(&self, name: &str) -> u64 {
        number(self.ask(name))
    }

    /// A field of what was stored.
    pub(crate) fn tell(&self, name: &str) -> Option<&str> {
        find(&self.told, name)
    }
}

fn find<'a>(fields: &'a [(String, String)], name: &str) -> Option<&'a str> {
    fields.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
}

/// `a=1 b{c 2 d=3}` as `a`: 1, `b.c`: 2, `b.d`: 3.
fn fields(text: &str, prefix: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut rest = text;
    while let Some(open) = rest.find('{') {
        let name_at = rest[..open].rfind(' ').map_or(0, |at| at + 1);
        let close = open + rest[open..].find('}').expect("a brace is closed");
        found.extend(flat(&rest[..name_at], prefix));
        let inner = &rest[open + 1..close];
        found.extend(flat(inner, &format!("{}{}.", prefix, &rest[name_at..open])));
        rest = &rest[close + 1..];
    }
    found.extend(flat(rest, prefix));
    found
}

fn flat(text: &str, prefix: &str) -> Vec<(String, String)> {
    let words: Vec<&str> = text.split_whitespace().collect();
    if words.iter().any(|word| word.contains('=')) {
        let pairs = words.iter().filter_map(|word| word.split_once('='));
        return pairs.map(|(name, value)| (format!("{prefix}{name}"), value.to_owned())).collect();
    }
    // Some structures were printed as names and values with a space between them.
    let pairs = words.chunks_exact(2).map(|pair| (format!("{prefix}{}", pair[0]), pair[1].to_owned()));
    pairs.collect()
}

/// Decimal or `0x` hexadecimal.
pub(crate) fn number(text: &str) -> u64 {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.unwrap_or_else(|_| panic!("{text:?} is no number"))
}

/// `10.9.0.1:7174(16)`, `af27`, or `-(0)` for none.
pub(crate) fn address(text: &str) -> Option<Address> {
    let text = text.split('(').next().unwrap_or(text);
    match text {
        "-" => None,
        "af27" => Some(Address::Ib(IbAddress { sid: 0x0106_0000, ..IbAddress::default() })),
        text => {
            let (ip, port) = text.rsplit_once(':').expect("an address has a port");
            let ip: IpAddr = ip.parse().expect("an address");
            Some(Address::Ip(SocketAddr::new(ip, port.parse().expect("a port"))))
        }
    }
}
