//! The etcd client: compare-and-swap writes, pages of a range, watches, leases, and the newest revision (one read for
//! all who ask at the same time). Every call ends in bounded time. `channel.rs` is the way there, `messages.rs` what is said.

mod channel;
pub mod messages;

use crate::options::Options;
use apimachinery::protobuf::ProtobufError;
use apimachinery::status::StatusError;
use bytes::Bytes;
pub use channel::Stream;
use channel::{Call, Channel};
use messages::{KeyValue, Write};
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// No single call takes longer.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// A lease is shared by what is written within a twentieth of its time, at most this long, and by at most so many keys. As
/// kube-apiserver's lease manager.
const LEASE_REUSE_MAX_SECONDS: i64 = 60;
const LEASE_REUSE_SHARE: i64 = 20;
const LEASE_KEYS_MAX: usize = 1000;
/// From these on, in their series, etcd never answers a progress request ahead of events, nor for another watch. As
/// kube-apiserver's feature check.
const PROGRESS_SINCE: [(u64, u64, u64); 2] = [(3, 4, 31), (3, 5, 13)];

/// gRPC's codes for what was refused, so was not done: invalid argument, not found, permission denied, resource exhausted,
/// out of range, unauthenticated.
const REFUSALS: [i32; 6] = [3, 5, 7, 8, 11, 16];

/// What etcd failed at.
#[derive(Debug, thiserror::Error)]
pub enum EtcdError {
    /// There is no connection: nothing was sent.
    #[error("etcd cannot be reached: {0}")]
    Unreachable(String),
    /// The connection broke while an answer was awaited.
    #[error("the connection to etcd broke: {0}")]
    Broken(String),
    /// With gRPC's code.
    #[error("etcd: {message} ({code})")]
    Refused { code: i32, message: String },
    #[error("etcd did not answer within {CALL_TIMEOUT:?}")]
    Timeout,
    /// The revision asked for is gone.
    #[error("etcd: required revision has been compacted")]
    Compacted,
    /// A write got no answer: it may have been done, or be done yet.
    #[error("etcd did not say whether it was written: {0}")]
    Uncertain(String),
    #[error("TLS to etcd: {0}")]
    Tls(String),
    #[error("--etcd-servers: {0:?} is no URL of http or https")]
    Endpoint(String),
}

/// A key and its value, as stored.
#[derive(Clone, Debug)]
pub struct Stored {
    pub key: String,
    pub value: Vec<u8>,
    pub mod_revision: i64,
    pub create_revision: i64,
}

/// The end of a compare-and-swap: done at a revision, or what stands there instead.
#[derive(Debug)]
pub enum Swap {
    Done { revision: i64 },
    Differs(Option<Stored>),
}

/// Handles to one etcd cluster. Cheap to clone.
#[derive(Clone)]
pub struct Etcd {
    channel: Channel,
    reads: Arc<Mutex<RevisionReads>>,
    leases: Arc<tokio::sync::Mutex<Vec<Lease>>>,
    /// One for each endpoint, to ask each for its version.
    members: Arc<[Channel]>,
    progress_is_true: Arc<AtomicBool>,
}

#[derive(Default)]
struct RevisionReads {
    in_flight: bool,
    waiting: Vec<oneshot::Sender<Option<i64>>>,
}

struct Lease {
    id: i64,
    ttl_seconds: i64,
    until: Instant,
    keys: usize,
}

// === impl EtcdError ===

impl EtcdError {
    /// What went wrong on the way may have gone wrong on the way back.
    fn of_a_write(self) -> Self {
        match &self {
            Self::Refused { code, .. } if REFUSALS.contains(code) => self,
            Self::Unreachable(_) | Self::Compacted | Self::Tls(_) | Self::Endpoint(_) => self,
            _ => Self::Uncertain(self.to_string()),
        }
    }
}

impl From<ProtobufError> for EtcdError {
    fn from(error: ProtobufError) -> Self {
        Self::Broken(error.to_string())
    }
}

impl From<EtcdError> for StatusError {
    fn from(error: EtcdError) -> Self {
        tracing::warn!(%error, "the store failed");
        match &error {
            EtcdError::Refused { message, .. } if message.contains("request is too large") => {
                StatusError::new(413, "RequestEntityTooLarge", "Request entity too large: limit is 1572864")
            }
            EtcdError::Compacted => StatusError::expired("The resourceVersion for the provided list is too old."),
            // Who is told to try again might do it twice.
            EtcdError::Uncertain(_) => {
                StatusError::timeout("the store did not answer in time: what was asked for may have been done, or not")
            }
            _ => StatusError::service_unavailable("the store is not available").retry_after(1),
        }
    }
}

// === impl Etcd ===

impl Etcd {
    /// Makes the client; the connection itself is made when first used.
    pub fn new(options: &Options) -> Result<Self, EtcdError> {
        let channel = Channel::new(options, &options.etcd_servers)?;
        let members = match options.etcd_servers.as_slice() {
            [_] => vec![channel.clone()],
            all => all
                .iter()
                .map(|server| Channel::new(options, std::slice::from_ref(server)))
                .collect::<Result<_, _>>()?,
        };
        Ok(Self {
            channel,
            reads: Arc::default(),
            leases: Arc::default(),
            members: members.into(),
            progress_is_true: Arc::default(),
        })
    }

    /// A watch of the keys from `start` up to `end`, from a revision on; [`messages::watched`] reads its messages.
    pub async fn watch(&self, start: &[u8], end: &[u8], from: i64) -> Result<Stream, EtcdError> {
        let opening = self.channel.stream(Call::Watch, messages::watch(start, end, from));
        tokio::time::timeout(CALL_TIMEOUT, opening).await.unwrap_or(Err(EtcdError::Timeout))
    }

    /// Can a progress notification be believed? Not before [`Etcd::learn_versions`] has found every member new enough.
    pub fn progress_is_true(&self) -> bool {
        self.progress_is_true.load(Ordering::Relaxed)
    }

    /// Asks every member for its version.
    pub async fn learn_versions(&self) {
        let mut all_new = true;
        for member in self.members.iter() {
            let answer = timed(member, Call::Status, messages::status()).await;
            let version =
                |answer: Bytes| Ok(String::from_utf8_lossy(messages::status_of(&answer)?.version).into_owned());
            match answer.and_then(version) {
                Ok(version) => all_new &= is_since(&version, &PROGRESS_SINCE),
                Err(error) => {
                    tracing::debug!(%error, "cannot learn a member's version");
                    all_new = false;
                }
            }
        }
        if self.progress_is_true.swap(all_new, Ordering::Relaxed) != all_new {
            tracing::info!(believed = all_new, "etcd's progress notifications");
        }
    }

    /// How big the database is, as the first endpoint has it.
    pub async fn size(&self) -> Result<i64, EtcdError> {
        let Some(member) = self.members.first() else { return Ok(0) };
        let answer = timed(member, Call::Status, messages::status()).await?;
        Ok(messages::status_of(&answer)?.db_size)
    }

    /// Reads one key; linearizable.
    pub async fn get(&self, key: &str) -> Result<Option<Stored>, EtcdError> {
        let answer = self.call(Call::Range, messages::range(key.as_bytes(), b"", 0, 0, false)).await?;
        Ok(messages::ranged(&answer)?.kvs.first().map(Stored::from))
    }

    /// One page of a range: keys from `start` up to `end`, at a revision (0: the newest). Gives the revision and how many
    /// keys there are in the whole range.
    pub async fn page(
        &self,
        start: &[u8],
        end: &[u8],
        revision: i64,
        limit: i64,
    ) -> Result<(Vec<Stored>, i64, i64), EtcdError> {
        let answer = self.call(Call::Range, messages::range(start, end, revision, limit, false)).await?;
        let ranged = messages::ranged(&answer)?;
        let read_at = if revision > 0 { revision } else { ranged.revision };
        Ok((ranged.kvs.iter().map(Stored::from).collect(), read_at, ranged.count))
    }

    /// Writes a key if its mod revision is as expected (0: it does not exist).
    pub async fn put(&self, key: &str, value: &[u8], expected: i64, lease: i64) -> Result<Swap, EtcdError> {
        self.swap(messages::swap(key.as_bytes(), expected, Write::Put { value, lease })).await
    }

    /// Deletes a key if its mod revision is as expected.
    pub async fn delete(&self, key: &str, expected: i64) -> Result<Swap, EtcdError> {
        self.swap(messages::swap(key.as_bytes(), expected, Write::Delete)).await
    }

    async fn swap(&self, message: Bytes) -> Result<Swap, EtcdError> {
        let answer = self.call(Call::Txn, message).await.map_err(EtcdError::of_a_write)?;
        let swapped = messages::swapped(&answer).map_err(|error| EtcdError::from(error).of_a_write())?;
        Ok(match swapped.succeeded {
            true => Swap::Done { revision: swapped.revision },
            false => Swap::Differs(swapped.current.as_ref().map(Stored::from)),
        })
    }

    /// Writes a key whatever stands there.
    pub async fn put_always(&self, key: &str, value: &[u8]) -> Result<(), EtcdError> {
        self.call(Call::Put, messages::put(key.as_bytes(), value)).await.map(drop)
    }

    /// Forgets revisions before this one.
    pub async fn compact(&self, revision: i64) -> Result<(), EtcdError> {
        self.call(Call::Compact, messages::compaction(revision)).await.map(drop)
    }

    async fn call(&self, call: Call, message: Bytes) -> Result<Bytes, EtcdError> {
        timed(&self.channel, call, message).await
    }

    /// The newest revision, read (linearizably) after this call began. Calls that come while a read is under way share the
    /// next one.
    pub async fn revision(&self) -> Result<i64, EtcdError> {
        let (sender, receiver) = oneshot::channel();
        let start = {
            let mut reads = self.reads.lock();
            reads.waiting.push(sender);
            !std::mem::replace(&mut reads.in_flight, true)
        };
        if start {
            tokio::spawn(read_revisions(self.channel.clone(), self.reads.clone()));
        }
        receiver.await.ok().flatten().ok_or(EtcdError::Timeout)
    }

    /// A lease of at least this many seconds, shared with what else was written lately.
    pub async fn lease(&self, ttl_seconds: i64) -> Result<i64, EtcdError> {
        let mut leases = self.leases.lock().await;
        leases.retain(|lease| lease.until > Instant::now() && lease.keys < LEASE_KEYS_MAX);
        if let Some(lease) = leases.iter_mut().find(|lease| lease.ttl_seconds == ttl_seconds) {
            lease.keys += 1;
            return Ok(lease.id);
        }
        let reuse_seconds = (ttl_seconds / LEASE_REUSE_SHARE).clamp(0, LEASE_REUSE_MAX_SECONDS);
        let answer = self.call(Call::Grant, messages::lease(ttl_seconds + reuse_seconds)).await?;
        let id = messages::granted(&answer)?;
        if reuse_seconds > 0 {
            let until = Instant::now() + Duration::from_secs(reuse_seconds.unsigned_abs());
            leases.push(Lease { id, ttl_seconds, until, keys: 1 });
        }
        Ok(id)
    }
}

/// Is a version (`3.5.9`) one of these or later in its series, or of a later series than all?
fn is_since(version: &str, since: &[(u64, u64, u64)]) -> bool {
    let mut numbers = version.split(['.', '-', '+']).map(|part| part.parse::<u64>().ok());
    let (Some(Some(major)), Some(Some(minor)), Some(Some(patch))) = (numbers.next(), numbers.next(), numbers.next())
    else {
        return false;
    };
    match since.iter().find(|(a, b, _)| (*a, *b) == (major, minor)) {
        Some((_, _, first)) => patch >= *first,
        None => since.iter().all(|(a, b, _)| (*a, *b) < (major, minor)),
    }
}

async fn read_revisions(channel: Channel, reads: Arc<Mutex<RevisionReads>>) {
    loop {
        // Who is about to ask may share it.
        tokio::task::yield_now().await;
        let waiting = {
            let mut reads = reads.lock();
            if reads.waiting.is_empty() {
                reads.in_flight = false;
                return;
            }
            std::mem::take(&mut reads.waiting)
        };
        // The header of any linearizable read has the newest revision; this key does not exist.
        let answer = timed(&channel, Call::Range, messages::range(b"\0", b"", 0, 0, true)).await;
        let revision = match answer.and_then(|answer| Ok(messages::revision(&answer)?)) {
            Ok(revision) => Some(revision),
            Err(error) => {
                tracing::warn!(%error, "cannot read the newest revision");
                None
            }
        };
        for sender in waiting {
            let _ = sender.send(revision);
        }
    }
}

/// Bounds a call's time. What there is of a call is in a box, or it would be in every request's future.
async fn timed(channel: &Channel, call: Call, message: Bytes) -> Result<Bytes, EtcdError> {
    match tokio::time::timeout(CALL_TIMEOUT, Box::pin(channel.call(call, message))).await {
        Ok(Err(EtcdError::Refused { message, .. })) if message.contains("revision has been compacted") => {
            Err(EtcdError::Compacted)
        }
        Ok(answer) => answer,
        Err(_) => Err(EtcdError::Timeout),
    }
}

impl From<&KeyValue<'_>> for Stored {
    fn from(kv: &KeyValue<'_>) -> Self {
        Self {
            key: String::from_utf8_lossy(kv.key).into_owned(),
            value: kv.value.to_vec(),
            mod_revision: kv.mod_revision,
            create_revision: kv.create_revision,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_believed_from_the_versions_on_that_keep_it_true() {
        for (version, expected) in [
            ("3.4.23", false),
            ("3.4.31", true),
            ("3.5.0", false),
            ("3.5.12", false),
            ("3.5.13", true),
            ("3.5.21-rc.1", true),
            ("3.6.0", true),
            ("3.3.99", false),
            ("4.0.0", true),
            ("", false),
            ("new", false),
        ] {
            assert_eq!(is_since(version, &PROGRESS_SINCE), expected, "{version}");
        }
    }
}
