//! What is said to etcd's JSON gateway, and what it answers: the messages of etcd's `rpc.proto` and `kv.proto`, as far as they
//! are used. Bytes are base64, 64-bit numbers strings, what is zero or empty is left out.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};

/// Bytes as JSON has them.
pub(super) fn encode(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

/// A number that may be written as a string.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Number(pub(super) u64);

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either {
            Number(i64),
            Text(String),
        }
        let number = match Either::deserialize(deserializer)? {
            Either::Number(number) => Some(number),
            Either::Text(text) => text.parse::<i64>().ok(),
        };
        // Negative ones stand for nothing of ours: a time to live of -1 is a lease that is over.
        number
            .map(|number| Self(u64::try_from(number).unwrap_or(0)))
            .ok_or_else(|| serde::de::Error::custom("no number"))
    }
}

/// Bytes, written as base64.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Bytes(pub(super) Vec<u8>);

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        STANDARD.decode(text).map(Self).map_err(serde::de::Error::custom)
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Header {
    pub(super) revision: Number,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct KeyValue {
    pub(super) key: Bytes,
    pub(super) value: Bytes,
    pub(super) mod_revision: Number,
    pub(super) lease: Number,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Range {
    pub(super) header: Header,
    pub(super) kvs: Vec<KeyValue>,
    pub(super) more: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Granted {
    #[serde(rename = "ID")]
    pub(super) id: Number,
    #[serde(rename = "TTL")]
    pub(super) ttl: Number,
}

/// Answers of a stream: one of the two.
#[derive(Debug, Deserialize)]
#[serde(default, bound = "T: Default + Deserialize<'de>")]
pub(super) struct Streamed<T> {
    pub(super) result: Option<T>,
    pub(super) error: Option<StreamError>,
}

impl<T> Default for Streamed<T> {
    fn default() -> Self {
        Self { result: None, error: None }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct StreamError {
    pub(super) message: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Watched {
    pub(super) header: Header,
    pub(super) created: bool,
    pub(super) canceled: bool,
    pub(super) compact_revision: Number,
    pub(super) cancel_reason: String,
    pub(super) events: Vec<Event>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Event {
    /// `DELETE`, or nothing.
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) kv: KeyValue,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Txn {
    pub(super) header: Header,
    pub(super) succeeded: bool,
    pub(super) responses: Vec<Response>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Response {
    pub(super) response_range: Option<Range>,
    pub(super) response_txn: Option<Box<Txn>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Token {
    pub(super) token: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Refused {
    pub(super) error: String,
    pub(super) message: String,
    pub(super) code: u32,
}

/// Several small transactions, each for itself, in one.
pub(super) fn each(parts: Vec<Value>) -> Value {
    let parts: Vec<Value> = parts.into_iter().map(|part| json!({ "request_txn": part })).collect();
    json!({ "success": parts })
}

/// Puts a key if it is not there, or tells what is.
pub(super) fn create(key: &str, value: &str, lease: u64) -> Value {
    let key = encode(key.as_bytes());
    json!({
        "compare": [{ "key": key, "target": "CREATE", "result": "EQUAL", "create_revision": "0" }],
        "success": [put(&key, value, lease)],
        "failure": [{ "request_range": { "key": key } }],
    })
}

/// Puts a key if nobody has changed it since.
pub(super) fn replace(key: &str, value: &str, lease: u64, since: u64) -> Value {
    let key = encode(key.as_bytes());
    json!({ "compare": [unchanged(&key, since)], "success": [put(&key, value, lease)] })
}

/// Deletes a key if nobody has changed it since.
pub(super) fn delete_unchanged(key: &str, since: u64) -> Value {
    let key = encode(key.as_bytes());
    json!({ "compare": [unchanged(&key, since)], "success": [delete(&key)] })
}

/// Deletes a key if it stands under a lease.
pub(super) fn delete_of_lease(key: &str, lease: u64) -> Value {
    let key = encode(key.as_bytes());
    let compare = json!({ "key": key, "target": "LEASE", "result": "EQUAL", "lease": lease.to_string() });
    json!({ "compare": [compare], "success": [delete(&key)] })
}

fn unchanged(key: &str, since: u64) -> Value {
    json!({ "key": key, "target": "MOD", "result": "EQUAL", "mod_revision": since.to_string() })
}

fn put(key: &str, value: &str, lease: u64) -> Value {
    json!({ "request_put": { "key": key, "value": encode(value.as_bytes()), "lease": lease.to_string() } })
}

fn delete(key: &str) -> Value {
    json!({ "request_delete_range": { "key": key } })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_understood_with_what_is_left_out_and_what_is_not_known() {
        // As etcd 3.4.23 and its documentation write them.
        let text = r#"{"header":{"cluster_id":"2037210783374497686","revision":"2","raft_term":"2"},"kvs":[{"key":"L2E=",
            "create_revision":"2","mod_revision":"2","version":"1","value":"eyJyb3V0ZXIiOiJhIn0=","lease":7}],"new":[1]}"#;
        let range: Range = serde_json::from_str(text).unwrap();
        assert_eq!((range.header.revision, range.more), (Number(2), false));
        assert_eq!((&range.kvs[0].key.0[..], range.kvs[0].lease), (&b"/a"[..], Number(7)));
        let text = r#"{"result":{"header":{"revision":"2"},"canceled":true,"compact_revision":"2"}}"#;
        let watched: Streamed<Watched> = serde_json::from_str(text).unwrap();
        assert_eq!(watched.result.unwrap().compact_revision, Number(2));
        let text = r#"{"result":{"ID":"12345"}}"#;
        let granted: Streamed<Granted> = serde_json::from_str(text).unwrap();
        assert_eq!(granted.result.unwrap().ttl, Number(0));
    }

    #[test]
    fn nonsense_is_an_error() {
        for text in [
            r#"{"kvs":[{"key":"*"}]}"#,
            r#"{"header":{"revision":"x"}}"#,
            r#"{"header":{"revision":1e300}}"#,
            r#"{"kvs":7}"#,
            "",
        ] {
            assert!(serde_json::from_str::<Range>(text).is_err(), "{text}");
        }
        let deep = "[".repeat(100_000);
        assert!(serde_json::from_str::<Range>(&deep).is_err());
    }
}
