//! Questions of others' zones: asked upstream, over UDP and, where an answer does not fit, TCP; remembered for a short time.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RecordType};
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(2);
const TOTAL_TIMEOUT: Duration = Duration::from_secs(5);
/// As kubeadm's Corefile: `cache 30`.
const MAX_TTL: Duration = Duration::from_secs(30);
/// How long a failure of all upstreams is remembered, so that they are not asked for every packet.
const FAILURE_TTL: Duration = Duration::from_secs(2);
const MAX_CACHED: usize = 10_000;
const MAX_UPSTREAMS: usize = 15;
/// How often resolv.conf is looked at.
const RESOLV_CONF_PERIOD: Duration = Duration::from_secs(5);
/// What upstream may send over UDP; it avoids fragments.
const UDP_PAYLOAD: u16 = 1232;

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct CacheKey {
    name: Name,
    kind: RecordType,
    dnssec_ok: bool,
}

struct Cached {
    answer: Message,
    since: Instant,
    life: Duration,
}

/// Where other zones' names are asked.
pub(crate) struct Forwarder {
    upstreams: Mutex<Upstreams>,
    /// The upstream that answered last.
    preferred: AtomicUsize,
    cache: Mutex<HashMap<CacheKey, Cached>>,
}

struct Upstreams {
    addresses: Vec<SocketAddr>,
    /// Followed when none were given.
    resolv_conf: Option<PathBuf>,
    modified: Option<SystemTime>,
    looked: Option<Instant>,
    /// Our own addresses, which would be a loop.
    own: Vec<SocketAddr>,
}

// === impl Forwarder ===

impl Forwarder {
    /// To `addresses`, or, if there are none, to the name servers of `resolv_conf`; never to `own`.
    pub(crate) fn new(addresses: Vec<SocketAddr>, resolv_conf: PathBuf, own: Vec<SocketAddr>) -> Forwarder {
        let resolv_conf = addresses.is_empty().then_some(resolv_conf);
        Forwarder {
            upstreams: Mutex::new(Upstreams { addresses, resolv_conf, modified: None, looked: None, own }),
            preferred: AtomicUsize::new(0),
            cache: Mutex::default(),
        }
    }

    /// Upstream's answer to the question; SERVFAIL where none comes. Whether it came from memory is told too.
    pub(crate) async fn ask(&self, query: &Query, dnssec_ok: bool) -> (Message, bool) {
        let key = CacheKey { name: query.name().to_lowercase(), kind: query.query_type(), dnssec_ok };
        if let Some(answer) = self.remembered(&key) {
            return (answer, true);
        }
        let answer = match timeout(TOTAL_TIMEOUT, self.ask_upstreams(query, dnssec_ok)).await {
            Ok(Some(answer)) => answer,
            Ok(None) | Err(_) => Message::error_msg(0, OpCode::Query, ResponseCode::ServFail),
        };
        self.remember(key, &answer);
        (answer, false)
    }

    async fn ask_upstreams(&self, query: &Query, dnssec_ok: bool) -> Option<Message> {
        let addresses = self.upstreams.lock().current();
        let first = self.preferred.load(Ordering::Relaxed);
        let mut refused = None;
        for step in 0..addresses.len() {
            let at = (first + step) % addresses.len();
            match ask_one(addresses[at], query, dnssec_ok).await {
                Ok(answer)
                    if !matches!(answer.metadata.response_code, ResponseCode::ServFail | ResponseCode::Refused) =>
                {
                    self.preferred.store(at, Ordering::Relaxed);
                    return Some(answer);
                }
                Ok(answer) => refused = Some(answer),
                Err(error) => tracing::debug!(upstream = %addresses[at], %error, name = %query.name(), "no answer"),
            }
        }
        refused
    }

    fn remembered(&self, key: &CacheKey) -> Option<Message> {
        let cache = self.cache.lock();
        let cached = cache.get(key)?;
        let age = cached.since.elapsed();
        if age >= cached.life {
            return None;
        }
        let mut answer = cached.answer.clone();
        let seconds = u32::try_from(age.as_secs()).unwrap_or(u32::MAX);
        for section in [&mut answer.answers, &mut answer.authorities, &mut answer.additionals] {
            for record in section.iter_mut() {
                record.ttl = record.ttl.saturating_sub(seconds);
            }
        }
        Some(answer)
    }

    fn remember(&self, key: CacheKey, answer: &Message) {
        let life = lifetime(answer);
        if life.is_zero() {
            return;
        }
        let mut cache = self.cache.lock();
        if cache.len() >= MAX_CACHED && !cache.contains_key(&key) {
            cache.retain(|_, cached| cached.since.elapsed() < cached.life);
            if cache.len() >= MAX_CACHED {
                cache.clear();
            }
        }
        cache.insert(key, Cached { answer: answer.clone(), since: Instant::now(), life });
    }
}

/// How long an answer is good: its shortest TTL, within bounds.
fn lifetime(answer: &Message) -> Duration {
    match answer.metadata.response_code {
        ResponseCode::NoError | ResponseCode::NXDomain => {
            let records = answer.answers.iter().chain(&answer.authorities);
            let shortest = records.map(|record| record.ttl).min().unwrap_or(0);
            Duration::from_secs(u64::from(shortest)).min(MAX_TTL)
        }
        _ => FAILURE_TTL,
    }
}

async fn ask_one(upstream: SocketAddr, query: &Query, dnssec_ok: bool) -> io::Result<Message> {
    let mut request = Message::new(rand::random(), MessageType::Query, OpCode::Query);
    request.metadata.recursion_desired = true;
    request.add_query(query.clone());
    let mut edns = Edns::new();
    edns.set_max_payload(UDP_PAYLOAD);
    edns.set_dnssec_ok(dnssec_ok);
    request.set_edns(edns);
    let bytes = request.to_vec().map_err(io::Error::other)?;
    let answer = timeout(ATTEMPT_TIMEOUT, over_udp(upstream, &request, &bytes)).await.map_err(io::Error::other)??;
    if !answer.metadata.truncation {
        return Ok(answer);
    }
    timeout(ATTEMPT_TIMEOUT, over_tcp(upstream, &request, &bytes)).await.map_err(io::Error::other)?
}

async fn over_udp(upstream: SocketAddr, request: &Message, bytes: &[u8]) -> io::Result<Message> {
    // A port of its own for each question makes answers hard to forge.
    let any: IpAddr = if upstream.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(upstream).await?;
    socket.send(bytes).await?;
    let mut buffer = [0u8; 4096];
    loop {
        let size = socket.recv(&mut buffer).await?;
        // What does not fit the question is not its answer.
        if let Some(answer) = fitting(request, &buffer[..size]) {
            return Ok(answer);
        }
    }
}

async fn over_tcp(upstream: SocketAddr, request: &Message, bytes: &[u8]) -> io::Result<Message> {
    let mut stream = TcpStream::connect(upstream).await?;
    let length = u16::try_from(bytes.len()).map_err(io::Error::other)?;
    stream.write_all(&length.to_be_bytes()).await?;
    stream.write_all(bytes).await?;
    let mut answer = vec![0u8; usize::from(stream.read_u16().await?)];
    stream.read_exact(&mut answer).await?;
    fitting(request, &answer).ok_or_else(|| io::Error::other("the answer does not fit the question"))
}

fn fitting(request: &Message, bytes: &[u8]) -> Option<Message> {
    let answer = Message::from_vec(bytes).ok()?;
    let fits = answer.metadata.id == request.metadata.id
        && answer.metadata.message_type == MessageType::Response
        && match (answer.queries.as_slice(), request.queries.as_slice()) {
            ([answered], [asked]) => answered.name() == asked.name() && answered.query_type() == asked.query_type(),
            ([], _) => answer.metadata.response_code != ResponseCode::NoError,
            _ => false,
        };
    fits.then_some(answer)
}

// === impl Upstreams ===

impl Upstreams {
    fn current(&mut self) -> Vec<SocketAddr> {
        let due = self.looked.is_none_or(|looked| looked.elapsed() >= RESOLV_CONF_PERIOD);
        if let Some(path) = self.resolv_conf.as_ref().filter(|_| due) {
            self.looked = Some(Instant::now());
            let modified = std::fs::metadata(path).and_then(|meta| meta.modified()).ok();
            if modified != self.modified {
                self.modified = modified;
                match std::fs::read_to_string(path) {
                    Ok(text) => self.addresses = name_servers(&text, &self.own),
                    Err(error) => tracing::warn!(path = %path.display(), %error, "no name servers"),
                }
                tracing::info!(upstreams = ?self.addresses, "forwarding");
            }
        }
        self.addresses.clone()
    }
}

/// The `nameserver` lines of a resolv.conf, without our own addresses.
fn name_servers(text: &str, own: &[SocketAddr]) -> Vec<SocketAddr> {
    let mut found = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        if words.next() != Some("nameserver") {
            continue;
        }
        // A scope (`fe80::1%eth0`) cannot be followed.
        let Some(address) = words.next().and_then(|word| word.parse::<IpAddr>().ok()) else { continue };
        let address = SocketAddr::new(address, 53);
        // On every address of the machine, or the pod, loopback is ours too: asked there we would ask ourselves.
        let everywhere = |own: &SocketAddr| own.port() == address.port() && own.ip().is_unspecified();
        if address.ip().is_loopback() && own.iter().any(everywhere) {
            continue;
        }
        if !own.contains(&address) && !found.contains(&address) && found.len() < MAX_UPSTREAMS {
            found.push(address);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use std::str::FromStr;

    use hickory_proto::rr::rdata::A;
    use hickory_proto::rr::{RData, Record};

    use super::*;

    #[test]
    fn name_servers_are_read() {
        let own = [SocketAddr::from(([10, 0, 0, 1], 53))];
        let text = "# x\nsearch a b\nnameserver 1.1.1.1\nnameserver 10.0.0.1\nnameserver\nnameserver fe80::1%eth0\nnameserver ::1\nnameserver 1.1.1.1\n";
        let found: Vec<String> = name_servers(text, &own).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["1.1.1.1:53", "[::1]:53"]);
    }

    fn answer(code: ResponseCode, ttl: Option<u32>) -> Message {
        let mut answer = Message::new(1, MessageType::Response, OpCode::Query);
        answer.metadata.response_code = code;
        let name = Name::from_str("a.").expect("a name");
        answer.answers.extend(ttl.map(|ttl| Record::from_rdata(name, ttl, RData::A(A::new(1, 2, 3, 4)))));
        answer
    }

    #[test]
    fn answers_live_as_long_as_their_shortest_record() {
        let cases = [
            (ResponseCode::NoError, Some(7), 7),
            (ResponseCode::NoError, Some(3600), 30),
            (ResponseCode::NoError, None, 0),
            (ResponseCode::NXDomain, Some(5), 5),
            (ResponseCode::ServFail, None, 2),
        ];
        for (code, ttl, want) in cases {
            assert_eq!(lifetime(&answer(code, ttl)).as_secs(), want, "{code} {ttl:?}");
        }
    }

    #[tokio::test]
    async fn questions_are_asked_once_and_failures_fall_over() {
        let upstream = UdpSocket::bind("127.0.0.1:0").await.expect("a socket");
        let silent = UdpSocket::bind("127.0.0.1:0").await.expect("a socket");
        let addresses = vec![silent.local_addr().expect("an address"), upstream.local_addr().expect("an address")];
        let asked = std::sync::Arc::new(AtomicUsize::new(0));
        let counter = asked.clone();
        tokio::spawn(async move {
            let mut buffer = [0u8; 1500];
            while let Ok((size, from)) = upstream.recv_from(&mut buffer).await {
                counter.fetch_add(1, Ordering::Relaxed);
                let request = Message::from_vec(&buffer[..size]).expect("a request");
                let mut reply = answer(ResponseCode::NoError, Some(20));
                reply.metadata.id = request.metadata.id;
                reply.add_query(request.queries[0].clone());
                // First a forged one.
                let mut forged = reply.clone();
                forged.metadata.id = forged.metadata.id.wrapping_add(1);
                for message in [forged, reply] {
                    upstream.send_to(&message.to_vec().expect("bytes"), from).await.expect("sent");
                }
            }
        });
        let forwarder = Forwarder::new(addresses, PathBuf::new(), Vec::new());
        let query = Query::query(Name::from_str("a.").expect("a name"), RecordType::A);
        let (first, cached) = forwarder.ask(&query, false).await;
        assert_eq!((first.answers.len(), cached), (1, false));
        let (_, cached) = forwarder.ask(&query, false).await;
        assert!(cached);
        assert_eq!(asked.load(Ordering::Relaxed), 1);
        assert_eq!(forwarder.preferred.load(Ordering::Relaxed), 1);
    }

    #[tokio::test]
    async fn without_upstreams_the_answer_is_a_failure() {
        let forwarder = Forwarder::new(Vec::new(), PathBuf::from("/nonexistent/resolv.conf"), Vec::new());
        let query = Query::query(Name::from_str("a.").expect("a name"), RecordType::A);
        assert_eq!(forwarder.ask(&query, false).await.0.metadata.response_code, ResponseCode::ServFail);
    }
}
