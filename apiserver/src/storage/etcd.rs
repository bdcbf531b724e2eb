//! The etcd client: connection, compare-and-swap writes, pages of a range, leases, and the newest revision (one read for
//! all who ask at the same time). Every call ends in bounded time.

use crate::options::Options;
use apimachinery::status::StatusError;
use etcd_client::{
    Certificate, Client, Compare, CompareOp, ConnectOptions, GetOptions, Identity, KvClient, LeaseClient,
    MaintenanceClient, PutOptions, TlsOptions, Txn, TxnOp, TxnOpResponse, WatchClient,
};
use parking_lot::Mutex;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// As etcd's Go client with kube-apiserver.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(30);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// No answer of etcd is bigger.
const MESSAGE_BYTES_MAX: usize = 512 << 20;
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
    #[error("etcd: {0}")]
    Client(#[from] etcd_client::Error),
    #[error("etcd did not answer within {CALL_TIMEOUT:?}")]
    Timeout,
    /// The revision asked for is gone.
    #[error("etcd: required revision has been compacted")]
    Compacted,
    /// A write got no answer: it may have been done, or be done yet.
    #[error("etcd did not say whether it was written: {0}")]
    Uncertain(String),
    #[error("cannot read {path}: {error}")]
    File { path: String, error: std::io::Error },
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
    kv: KvClient,
    watch: WatchClient,
    lease: LeaseClient,
    reads: Arc<Mutex<RevisionReads>>,
    leases: Arc<tokio::sync::Mutex<Vec<Lease>>>,
    /// One connection for each endpoint, to ask each for its version.
    members: Arc<[MaintenanceClient]>,
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
            Self::Client(etcd_client::Error::GRpcStatus(status))
                if REFUSALS.contains(&(status.code() as i32)) || never_sent(status) =>
            {
                self
            }
            Self::Compacted | Self::File { .. } => self,
            _ => Self::Uncertain(self.to_string()),
        }
    }
}

/// There was no connection to send it on.
fn never_sent(error: &dyn std::error::Error) -> bool {
    let mut cause = error.source();
    while let Some(error) = cause {
        if error.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::ConnectionRefused) {
            return true;
        }
        cause = error.source();
    }
    false
}

impl From<EtcdError> for StatusError {
    fn from(error: EtcdError) -> Self {
        tracing::warn!(%error, "the store failed");
        match &error {
            EtcdError::Client(etcd_client::Error::GRpcStatus(status))
                if status.message().contains("request is too large") =>
            {
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
    pub async fn connect(options: &Options) -> Result<Self, EtcdError> {
        let mut connect = ConnectOptions::new()
            .with_connect_timeout(CONNECT_TIMEOUT)
            .with_keep_alive(KEEP_ALIVE_INTERVAL, KEEP_ALIVE_TIMEOUT)
            .with_keep_alive_while_idle(true)
            .with_require_leader(true);
        if options.etcd_servers.iter().any(|server| server.starts_with("https://")) {
            let mut tls = TlsOptions::new();
            if let Some(ca) = &options.etcd_cafile {
                tls = tls.ca_certificate(Certificate::from_pem(read(ca)?));
            }
            if let (Some(certificate), Some(key)) = (&options.etcd_certfile, &options.etcd_keyfile) {
                tls = tls.identity(Identity::from_pem(read(certificate)?, read(key)?));
            }
            connect = connect.with_tls(tls);
        }
        let mut members = Vec::new();
        for server in &options.etcd_servers {
            members.push(Client::connect([server], Some(connect.clone())).await?.maintenance_client());
        }
        let client = Client::connect(&options.etcd_servers, Some(connect)).await?;
        Ok(Self {
            kv: client
                .kv_client()
                .max_decoding_message_size(MESSAGE_BYTES_MAX)
                .max_encoding_message_size(MESSAGE_BYTES_MAX),
            watch: client.watch_client().max_decoding_message_size(MESSAGE_BYTES_MAX),
            lease: client.lease_client(),
            reads: Arc::default(),
            leases: Arc::default(),
            members: members.into(),
            progress_is_true: Arc::default(),
        })
    }

    pub fn watch_client(&self) -> WatchClient {
        self.watch.clone()
    }

    /// Can a progress notification be believed? Not before [`Etcd::learn_versions`] has found every member new enough.
    pub fn progress_is_true(&self) -> bool {
        self.progress_is_true.load(Ordering::Relaxed)
    }

    /// Asks every member for its version.
    pub async fn learn_versions(&self) {
        let mut all_new = true;
        for member in self.members.iter() {
            match timed(Box::pin(member.clone().status())).await {
                Ok(status) => all_new &= is_since(status.version(), &PROGRESS_SINCE),
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
        Ok(timed(Box::pin(member.clone().status())).await?.db_size())
    }

    /// Reads one key; linearizable.
    pub async fn get(&self, key: &str) -> Result<Option<Stored>, EtcdError> {
        let mut response = timed(Box::pin(self.kv.clone().get(key, None))).await?;
        Ok(response.take_kvs().into_iter().next().map(Stored::from))
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
        let options = GetOptions::new().with_range(end).with_revision(revision).with_limit(limit);
        let mut response = timed(Box::pin(self.kv.clone().get(start, Some(options)))).await?;
        let read_at = if revision > 0 { revision } else { response.header().map_or(0, |h| h.revision()) };
        let count = response.count();
        Ok((response.take_kvs().into_iter().map(Stored::from).collect(), read_at, count))
    }

    /// Writes a key if its mod revision is as expected (0: it does not exist).
    pub async fn put(&self, key: &str, value: &[u8], expected: i64, lease: i64) -> Result<Swap, EtcdError> {
        let options = (lease != 0).then(|| PutOptions::new().with_lease(lease));
        self.swap(key, expected, TxnOp::put(key, value, options)).await
    }

    /// Deletes a key if its mod revision is as expected.
    pub async fn delete(&self, key: &str, expected: i64) -> Result<Swap, EtcdError> {
        self.swap(key, expected, TxnOp::delete(key, None)).await
    }

    async fn swap(&self, key: &str, expected: i64, then: TxnOp) -> Result<Swap, EtcdError> {
        let txn = Txn::new()
            .when([Compare::mod_revision(key, CompareOp::Equal, expected)])
            .and_then([then])
            .or_else([TxnOp::get(key, None)]);
        let response = timed(Box::pin(self.kv.clone().txn(txn))).await.map_err(EtcdError::of_a_write)?;
        if response.succeeded() {
            return Ok(Swap::Done { revision: response.header().map_or(0, |h| h.revision()) });
        }
        let current = response.op_responses().into_iter().find_map(|op| match op {
            TxnOpResponse::Get(mut get) => get.take_kvs().into_iter().next().map(Stored::from),
            _ => None,
        });
        Ok(Swap::Differs(current))
    }

    /// Writes a key whatever stands there.
    pub async fn put_always(&self, key: &str, value: &[u8]) -> Result<i64, EtcdError> {
        let response = timed(Box::pin(self.kv.clone().put(key, value, None))).await?;
        Ok(response.header().map_or(0, |h| h.revision()))
    }

    /// Forgets revisions before this one.
    pub async fn compact(&self, revision: i64) -> Result<(), EtcdError> {
        timed(Box::pin(self.kv.clone().compact(revision, None))).await.map(|_| ())
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
            tokio::spawn(read_revisions(self.kv.clone(), self.reads.clone()));
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
        let granted = timed(Box::pin(self.lease.clone().grant(ttl_seconds + reuse_seconds, None))).await?;
        if reuse_seconds > 0 {
            let until = Instant::now() + Duration::from_secs(reuse_seconds.unsigned_abs());
            leases.push(Lease { id: granted.id(), ttl_seconds, until, keys: 1 });
        }
        Ok(granted.id())
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

async fn read_revisions(kv: KvClient, reads: Arc<Mutex<RevisionReads>>) {
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
        let revision = match timed(Box::pin(kv.clone().get("\0", Some(GetOptions::new().with_count_only())))).await {
            Ok(response) => response.header().map(|h| h.revision()),
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

/// Bounds a call's time. What etcd's client keeps of a call is big: it is in a box, or it would be in every request's future.
async fn timed<T>(call: Pin<Box<impl Future<Output = Result<T, etcd_client::Error>>>>) -> Result<T, EtcdError> {
    match tokio::time::timeout(CALL_TIMEOUT, call).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(etcd_client::Error::GRpcStatus(status))) if status.message().contains("revision has been compacted") => {
            Err(EtcdError::Compacted)
        }
        Ok(Err(error)) => Err(error.into()),
        Err(_) => Err(EtcdError::Timeout),
    }
}

fn read(path: &std::path::Path) -> Result<Vec<u8>, EtcdError> {
    std::fs::read(path).map_err(|error| EtcdError::File { path: path.display().to_string(), error })
}

impl From<etcd_client::KeyValue> for Stored {
    fn from(kv: etcd_client::KeyValue) -> Self {
        let (mod_revision, create_revision) = (kv.mod_revision(), kv.create_revision());
        let (key, value) = kv.into_key_value();
        Self { key: String::from_utf8_lossy(&key).into_owned(), value, mod_revision, create_revision }
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
