//! The directory in etcd, by the JSON gateway that its servers have since 3.4 (`/v3/`).
//!
//! The gateway, not gRPC: that takes an asynchronous runtime and a compiler of protocol files for what are seven small
//! requests. Everything stands under one lease; an address is claimed by a transaction that creates its key. Leaves to others:
//! HTTP (`http`), JSON (`words`), keys and values (`keys`), when to do what (the follower).

mod http;
mod keys;
mod words;

use std::{
    fs::File,
    io::{self, Read},
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use rustls::ClientConfig;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::{
    announcements::Verdict,
    registry::{Cancel, Lease, Listing, Registry, Seen, Trouble, Watch},
    view::{Change, Key, MAX_ADDRESSES, MAX_ROUTERS},
};
use crate::{
    config::{self, Endpoint},
    link,
};
use http::{Answer, Connection};
use keys::Keys;
use words::{Granted, KeyValue, Number, Range, Streamed, Token, Txn, Watched, encode};

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// The same when this router ends.
const SHORT_PATIENCE: Duration = Duration::from_secs(1);
/// A watch that says nothing for so long is begun anew: a server tells that it is alive every ten minutes.
const WATCH_PATIENCE: Duration = Duration::from_secs(15 * 60);
/// The longest answer: a page of a listing, or changes (etcd sends at most 1.5 MiB of them in one piece).
const LONGEST: usize = 8 << 20;
/// Entries of a listing that are asked for at a time.
const PAGE: usize = 1000;
/// The gRPC code of who is not logged in (any more).
const UNAUTHENTICATED: u32 = 16;
const NOT_FOUND: u32 = 5;
/// The longest password.
const LONGEST_PASSWORD: u64 = 4096;

/// A connection to an etcd.
#[derive(Debug)]
pub(super) struct Etcd {
    config: config::Directory,
    keys: Keys,
    own: String,
    tls: Option<Arc<ClientConfig>>,
    /// The server in use.
    current: usize,
    at: Option<SocketAddr>,
    connection: Option<Connection>,
    token: Option<String>,
    lease: Option<u64>,
    patience: Duration,
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::InvalidData => Self::Nonsense(error.to_string()),
            io::ErrorKind::TimedOut => Self::Away("it does not answer in time".to_owned()),
            io::ErrorKind::UnexpectedEof => Self::Away("it hung up".to_owned()),
            _ => Self::Away(error.to_string()),
        }
    }
}

impl From<serde_json::Error> for Trouble {
    fn from(error: serde_json::Error) -> Self {
        Self::Nonsense(error.to_string())
    }
}

impl Etcd {
    /// One that is not connected yet.
    pub(super) fn new(config: &config::Directory, links: &config::Links, tenants: &[String]) -> Self {
        let keys = Keys::new(&config.prefix, links.security, tenants);
        Self {
            config: config.clone(),
            keys,
            own: links.name.clone(),
            tls: None,
            // The first one is the next.
            current: config.etcd.len() - 1,
            at: None,
            connection: None,
            token: None,
            lease: None,
            patience: PATIENCE,
        }
    }

    fn endpoint(&self) -> &Endpoint {
        &self.config.etcd[self.current]
    }

    /// A new connection to the server in use, at the same address as before.
    fn connect(&mut self) -> Result<Connection, Trouble> {
        let addresses = self.at.map_or_else(|| http::resolve(self.endpoint()), |at| Ok(vec![at]))?;
        let mut trouble = Trouble::Away(format!("{} has no address", self.endpoint().host));
        for address in addresses {
            match Connection::open(self.endpoint(), address, self.tls.as_ref()) {
                Ok(connection) => {
                    self.at = Some(address);
                    return Ok(connection);
                }
                Err(error) => trouble = error.into(),
            }
        }
        Err(trouble)
    }

    /// Asks, and reads the beginning of the answer. A connection that was open for long may be closed by now.
    fn ask(&mut self, path: &str, body: &Value) -> Result<(Connection, Answer), Trouble> {
        let until = Instant::now() + self.patience;
        let body = body.to_string();
        if let Some(mut old) = self.connection.take().filter(|connection| connection.is_open)
            && let Ok(answer) = old.post(path, self.token.as_deref(), body.as_bytes(), until)
        {
            return Ok((old, answer));
        }
        let mut connection = self.connect()?;
        let answer = connection.post(path, self.token.as_deref(), body.as_bytes(), until)?;
        Ok((connection, answer))
    }

    /// Asks, once.
    fn call_once<T: DeserializeOwned>(&mut self, path: &str, body: &Value) -> Result<T, Failure> {
        let until = Instant::now() + self.patience;
        let (mut connection, mut answer) = self.ask(path, body)?;
        let text = whole(&mut connection, &mut answer, until)?;
        self.connection = Some(connection).filter(|connection| connection.is_open);
        if answer.status != 200 {
            return Err(refusal(answer.status, &text));
        }
        Ok(serde_json::from_slice(&text).map_err(Trouble::from)?)
    }

    /// Asks, and logs in again where that has run out.
    fn call<T: DeserializeOwned>(&mut self, path: &str, body: &Value) -> Result<T, Trouble> {
        match self.call_once(path, body) {
            Err(Failure::LoggedOut(_)) if self.config.user.is_some() => {
                self.log_in()?;
                Ok(self.call_once(path, body)?)
            }
            other => Ok(other?),
        }
    }

    fn log_in(&mut self) -> Result<(), Trouble> {
        let (Some(user), Some(file)) = (self.config.user.clone(), self.config.password_file.clone()) else {
            return Ok(());
        };
        self.token = None;
        let body = json!({ "name": user, "password": password(&file)? });
        let Token { token } = self.call_once("/v3/auth/authenticate", &body)?;
        let is_word = !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic());
        if !is_word || token.len() > 8192 {
            return Err(Trouble::Nonsense("a token that cannot be sent".to_owned()));
        }
        self.token = Some(token);
        Ok(())
    }

    fn lease(&self) -> Result<u64, Trouble> {
        self.lease.ok_or(Trouble::NoLease)
    }

    /// Everything below the prefix.
    fn range(&self) -> (String, Vec<u8>) {
        let mut end = self.keys.prefix.clone().into_bytes();
        // The prefix ends with a slash, so there is a next byte.
        if let Some(last) = end.last_mut() {
            *last += 1;
        }
        (self.keys.prefix.clone(), end)
    }

    /// Claims by a transaction: creates what is not there, takes over what stands in this router's name from before.
    /// `is_ours` tells of a value whether it does; else it says whose it is.
    fn take(
        &mut self,
        wanted: &[(String, String)],
        is_ours: impl Fn(&KeyValue) -> Result<(), String>,
    ) -> Result<Vec<Verdict>, Trouble> {
        let lease = self.lease()?;
        let parts = wanted.iter().map(|(key, value)| words::create(key, value, lease));
        let txn: Txn = self.transact(parts.collect())?;
        let revision = txn.header.revision.0;
        let mut verdicts = vec![Verdict::Again; wanted.len()];
        let mut again = Vec::new();
        for (at, part) in txn.responses.into_iter().take(wanted.len()).enumerate() {
            let part =
                part.response_txn.ok_or_else(|| Trouble::Nonsense("no answer to a part".to_owned()))?;
            if part.succeeded {
                verdicts[at] = Verdict::Granted(revision);
                continue;
            }
            let there =
                part.responses.into_iter().next().and_then(|one| one.response_range?.kvs.into_iter().next());
            let Some(there) = there else { continue };
            match is_ours(&there) {
                Ok(()) if there.lease == Number(lease) => {
                    verdicts[at] = Verdict::Granted(there.mod_revision.0)
                }
                Ok(()) => again.push((at, there.mod_revision.0)),
                Err(other) => verdicts[at] = Verdict::Refused(other),
            }
        }
        if again.is_empty() {
            return Ok(verdicts);
        }
        let parts =
            again.iter().map(|(at, since)| words::replace(&wanted[*at].0, &wanted[*at].1, lease, *since));
        let txn: Txn = self.transact(parts.collect())?;
        for ((at, _), part) in again.iter().zip(txn.responses) {
            if part.response_txn.is_some_and(|part| part.succeeded) {
                verdicts[*at] = Verdict::Granted(txn.header.revision.0);
            }
        }
        Ok(verdicts)
    }

    /// Several transactions at once. A lease that is over is [`Trouble::NoLease`].
    fn transact(&mut self, parts: Vec<Value>) -> Result<Txn, Trouble> {
        match self.call_once("/v3/kv/txn", &words::each(parts.clone())) {
            Err(Failure::NotFound(_)) => {
                self.lease = None;
                Err(Trouble::NoLease)
            }
            Err(Failure::LoggedOut(_)) => self.call("/v3/kv/txn", &words::each(parts)),
            other => Ok(other?),
        }
    }

    fn list_page(&mut self, from: &[u8], end: &[u8], revision: u64) -> Result<Range, Trouble> {
        let mut body = json!({ "key": encode(from), "range_end": encode(end), "limit": PAGE.to_string() });
        if revision != 0 {
            body["revision"] = json!(revision.to_string());
        }
        match self.call_once("/v3/kv/range", &body) {
            Err(Failure::Compacted) => Err(Trouble::Compacted),
            Err(Failure::LoggedOut(_)) => self.call("/v3/kv/range", &body),
            other => Ok(other?),
        }
    }
}

impl Registry for Etcd {
    fn place(&self) -> String {
        self.endpoint().to_string()
    }

    fn servers(&self) -> usize {
        self.config.etcd.len()
    }

    fn reconnect(&mut self) -> Result<(), Trouble> {
        (self.connection, self.at) = (None, None);
        self.current = (self.current + 1) % self.config.etcd.len();
        if self.endpoint().is_secure {
            // Read again each time: certificates are renewed.
            let config = link::etcd_tls(&self.config).map_err(|error| Trouble::Files(error.to_string()))?;
            self.tls = Some(Arc::new(config));
        }
        self.log_in()
    }

    fn list(&mut self) -> Result<Listing, Trouble> {
        let (first, end) = self.range();
        let (mut from, mut listing) = (first.into_bytes(), Listing::default());
        // Entries of other tenants count, too: what is not kept has to be read all the same.
        for _ in 0..=(MAX_ADDRESSES + MAX_ROUTERS) * 4 / PAGE {
            let page = self.list_page(&from, &end, listing.revision)?;
            if listing.revision == 0 {
                listing.revision = page.header.revision.0;
            }
            for entry in &page.kvs {
                let Some(change) = self.keys.read(&entry.key.0, Some(&entry.value.0)) else { continue };
                // There is no room for more; whoever follows says so.
                if listing.changes.len() > MAX_ADDRESSES + MAX_ROUTERS {
                    break;
                }
                match &change {
                    Change::NoRouter(_) | Change::NoAddress(_) => continue,
                    Change::Address(key, router) if *router == self.own => {
                        listing.own.push((*key, entry.mod_revision.0));
                    }
                    _ => {}
                }
                listing.changes.push(change);
            }
            let last = page.kvs.last().map(|entry| entry.key.0.clone());
            let Some(mut last) = last.filter(|last| page.more && *last >= from) else { return Ok(listing) };
            last.push(0);
            from = last;
        }
        Err(Trouble::Nonsense("there are too many keys below the prefix".to_owned()))
    }

    fn watch(&mut self, after: u64) -> Result<(Box<dyn Watch>, Cancel), Trouble> {
        let (first, end) = self.range();
        let request = json!({ "create_request": {
            "key": encode(first.as_bytes()),
            "range_end": encode(&end),
            "start_revision": after.saturating_add(1).to_string(),
            "progress_notify": true,
            "fragment": true,
        }});
        let until = Instant::now() + self.patience;
        let mut connection = self.connect()?;
        let answer =
            connection.post("/v3/watch", self.token.as_deref(), request.to_string().as_bytes(), until)?;
        let cancel = Box::new(connection.canceller()?);
        let mut watch =
            EtcdWatch { connection, answer, keys: self.keys.clone(), input: Vec::new(), begun: false };
        if watch.answer.status != 200 {
            let text = whole(&mut watch.connection, &mut watch.answer, until)?;
            return Err(refusal(watch.answer.status, &text).into());
        }
        Ok((Box::new(watch), cancel))
    }

    fn keep(&mut self) -> Result<Lease, Trouble> {
        if let Some(lease) = self.lease {
            let body = json!({ "ID": lease.to_string() });
            let kept: Streamed<Granted> = self.call("/v3/lease/keepalive", &body)?;
            if let Some(error) = kept.error {
                return Err(Trouble::Refusal(error.message));
            }
            let ttl = kept.result.unwrap_or_default().ttl.0;
            if ttl != 0 {
                return Ok(Lease { time: Duration::from_secs(ttl.min(3600)), is_new: false });
            }
        }
        self.lease = None;
        let granted: Granted =
            self.call("/v3/lease/grant", &json!({ "TTL": self.config.lease.to_string() }))?;
        if granted.id == Number(0) || granted.ttl == Number(0) {
            return Err(Trouble::Nonsense("a lease without number or time".to_owned()));
        }
        self.lease = Some(granted.id.0);
        Ok(Lease { time: Duration::from_secs(granted.ttl.0.min(3600)), is_new: true })
    }

    fn enrol(&mut self, address: SocketAddr) -> Result<Verdict, Trouble> {
        let wanted = [(self.keys.router(&self.own), keys::of_router(address))];
        let keys = self.keys.clone();
        // One address, one listener: who stands there is a former life of this router.
        let is_ours = move |there: &KeyValue| match keys.router_value(&there.value.0) {
            Some(other) if other == address => Ok(()),
            Some(other) => Err(other.to_string()),
            None => Err("nobody knows where".to_owned()),
        };
        Ok(self.take(&wanted, is_ours)?.pop().unwrap_or(Verdict::Again))
    }

    fn claim(&mut self, keys: &[Key]) -> Result<Vec<Verdict>, Trouble> {
        let value = keys::of_address(&self.own);
        let wanted: Vec<_> = keys.iter().map(|key| (self.keys.address(key), value.clone())).collect();
        let own = self.own.clone();
        self.take(&wanted, move |there| match keys::address_value(&there.value.0) {
            Some(router) if router == own => Ok(()),
            Some(router) => Err(router),
            None => Err("nobody knows whom".to_owned()),
        })
    }

    fn release(&mut self, keys: &[Key]) -> Result<(), Trouble> {
        let lease = self.lease()?;
        let parts = keys.iter().map(|key| words::delete_of_lease(&self.keys.address(key), lease)).collect();
        self.transact(parts).map(|_| ())
    }

    fn sweep(&mut self, keys: &[(Key, u64)]) -> Result<(), Trouble> {
        let part = |(key, since): &(Key, u64)| words::delete_unchanged(&self.keys.address(key), *since);
        let parts = keys.iter().map(part).collect();
        self.transact(parts).map(|_| ())
    }

    fn leave(&mut self) {
        self.patience = SHORT_PATIENCE;
        if let Some(lease) = self.lease.take() {
            let body = json!({ "ID": lease.to_string() });
            if let Err(trouble) = self.call::<Value>("/v3/lease/revoke", &body) {
                tracing::debug!(%trouble, "the directory was not told that this router ends; its lease will");
            }
        }
    }
}

/// A watch: an answer without an end, a line for each group of changes.
struct EtcdWatch {
    connection: Connection,
    answer: Answer,
    keys: Keys,
    input: Vec<u8>,
    begun: bool,
}

impl Watch for EtcdWatch {
    fn next(&mut self) -> Result<Vec<Seen>, Trouble> {
        let line = self.line()?;
        let watched: Streamed<Watched> = serde_json::from_slice(&line)?;
        if let Some(error) = watched.error {
            return Err(Trouble::Refusal(error.message));
        }
        let watched = watched.result.unwrap_or_default();
        if watched.compact_revision != Number(0) {
            return Err(Trouble::Compacted);
        }
        if watched.canceled {
            return Err(Trouble::Refusal(watched.cancel_reason));
        }
        self.begun |= watched.created;
        let mut seen: Vec<Seen> = Vec::new();
        for event in watched.events {
            let value = (event.kind != "DELETE").then_some(&event.kv.value.0[..]);
            if let Some(change) = self.keys.read(&event.kv.key.0, value) {
                seen.push(Seen { change, revision: event.kv.mod_revision.0 });
            }
        }
        Ok(seen)
    }
}

impl EtcdWatch {
    fn line(&mut self) -> Result<Vec<u8>, Trouble> {
        let mut looked = 0;
        loop {
            if let Some(at) = self.input[looked..].iter().position(|byte| *byte == b'\n') {
                let line = self.input.drain(..=looked + at).collect();
                return Ok(line);
            }
            looked = self.input.len();
            if looked > LONGEST {
                return Err(Trouble::Nonsense("a line without an end".to_owned()));
            }
            let until = Instant::now() + WATCH_PATIENCE;
            if !self.connection.read(&mut self.answer, &mut self.input, Some(until))? {
                return Err(Trouble::Away("it ended the watch".to_owned()));
            }
        }
    }
}

/// Why a question has no answer.
#[derive(Debug)]
enum Failure {
    /// Who asks must log in.
    LoggedOut(String),
    NotFound(String),
    Compacted,
    Other(Trouble),
}

impl From<Trouble> for Failure {
    fn from(trouble: Trouble) -> Self {
        Self::Other(trouble)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Other(error.into())
    }
}

impl From<Failure> for Trouble {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::LoggedOut(message) | Failure::NotFound(message) => Self::Refusal(message),
            Failure::Compacted => Self::Compacted,
            Failure::Other(trouble) => trouble,
        }
    }
}

/// What an answer other than 200 means.
fn refusal(status: u16, text: &[u8]) -> Failure {
    let words::Refused { error, message, code } = serde_json::from_slice(text).unwrap_or_default();
    let message = [message, error].into_iter().find(|words| !words.is_empty());
    // What stands before the gateway speaks plain text.
    let message =
        message.unwrap_or_else(|| format!("HTTP status {status} {}", String::from_utf8_lossy(text)));
    let message: String = message.trim().chars().filter(|c| !c.is_control()).take(200).collect();
    // Logged out by time; or never logged in; or users were changed meanwhile.
    let words = ["user name is empty", "revision of auth store is old", "revision in header is old"];
    if code == UNAUTHENTICATED || words.iter().any(|word| message.contains(word)) {
        return Failure::LoggedOut(message);
    }
    match code {
        NOT_FOUND => Failure::NotFound(message),
        _ if message.contains("required revision has been compacted") => Failure::Compacted,
        _ => Failure::Other(Trouble::Refusal(message)),
    }
}

/// Reads an answer to its end.
fn whole(connection: &mut Connection, answer: &mut Answer, until: Instant) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    while connection.read(answer, &mut text, Some(until))? {
        if text.len() > LONGEST {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "an answer without an end"));
        }
    }
    Ok(text)
}

/// The password in a file, without the line end.
fn password(path: &Path) -> Result<String, Trouble> {
    let mut text = String::new();
    let read = File::open(path).and_then(|file| file.take(LONGEST_PASSWORD).read_to_string(&mut text));
    read.map_err(|error| Trouble::Files(format!("cannot read {}: {error}", path.display())))?;
    Ok(text.trim_end_matches(['\r', '\n']).to_owned())
}

/// What an etcd says when it is looked at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// The server that answered.
    pub place: String,
    /// Its revision.
    pub revision: u64,
    /// Routers in the directory, this one included.
    pub routers: usize,
    /// Addresses of this router's tenants.
    pub addresses: usize,
}

/// Looks what the etcd of a configuration holds. Each server is asked, the first that answers counts. `None`: there is
/// none.
///
/// # Errors
/// Why the last one does not answer.
pub fn probe(config: &config::Config) -> Option<Result<Probe, String>> {
    let links = config.links.as_ref()?;
    let directory = config.directory.as_ref().filter(|directory| directory.is_etcd())?;
    let names: Vec<String> = match config.tenants.is_empty() {
        true => vec!["default".to_owned()],
        false => config.tenants.iter().map(|tenant| tenant.name.clone()).collect(),
    };
    let mut etcd = Etcd::new(directory, links, &names);
    let mut trouble = String::new();
    for _ in 0..directory.etcd.len() {
        match etcd.reconnect().and_then(|()| etcd.list()) {
            Ok(listing) => {
                let is_router = |change: &&Change| matches!(change, Change::Router(..));
                let routers = listing.changes.iter().filter(is_router).count();
                let addresses = listing.changes.len() - routers;
                return Some(Ok(Probe {
                    place: etcd.place(),
                    revision: listing.revision,
                    routers,
                    addresses,
                }));
            }
            Err(other) => trouble = format!("{}: {other}", etcd.place()),
        }
    }
    Some(Err(trouble))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(status: u16, text: &str) -> Failure {
        refusal(status, text.as_bytes())
    }

    #[test]
    fn refusals_are_told_apart_by_what_is_to_be_done() {
        // As etcd 3.4.23 writes them.
        let text = r#"{"error":"etcdserver: requested lease not found","message":"etcdserver: requested lease not found","code":5}"#;
        assert!(matches!(refused(404, text), Failure::NotFound(_)));
        let text = r#"{"error":"etcdserver: mvcc: required revision has been compacted","code":11}"#;
        assert!(matches!(refused(400, text), Failure::Compacted));
        for text in [
            r#"{"error":"etcdserver: invalid auth token","code":16}"#,
            r#"{"error":"etcdserver: user name is empty","code":3}"#,
        ] {
            assert!(matches!(refused(401, text), Failure::LoggedOut(_)), "{text}");
        }
        let plain = "CommonName of client sending a request against gateway will be ignored\n\x1b[31m";
        let trouble = Trouble::from(refused(400, plain)).to_string();
        assert!(
            trouble.contains("HTTP status 400 CommonName of client") && !trouble.contains('\x1b'),
            "{trouble}"
        );
        assert!(Trouble::from(refused(500, &"x".repeat(9999))).to_string().len() < 300);
    }
}
