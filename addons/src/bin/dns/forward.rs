//! Questions of others' zones: asked upstream, over UDP and, where an answer does not fit, TCP; remembered for a short time.
//!
//! A name server that does not answer is passed over until a check of its health is answered; if none answers, all are asked:
//! then it is the checks that are broken.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, RecordType};
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

use crate::hosts::Followed;
use crate::telemetry::Telemetry;

const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(2);
const TOTAL_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a failure of all upstreams is remembered, so that they are not asked for every packet.
const FAILURE_TTL: Duration = Duration::from_secs(2);
const MAX_UPSTREAMS: usize = 15;
/// What upstream may send over UDP; it avoids fragments.
const UDP_PAYLOAD: u16 = 1232;

/// In which order name servers are asked. As CoreDNS' `policy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub(crate) enum Policy {
    Random,
    RoundRobin,
    Sequential,
}

/// What is asked where, and what is remembered.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    /// Name servers of all domains; if there are none, those of `resolv_conf`.
    pub upstreams: Vec<SocketAddr>,
    pub resolv_conf: PathBuf,
    /// Domains with name servers of their own.
    pub stubs: Vec<(Name, SocketAddr)>,
    /// Domains that are not asked for.
    pub except: Vec<Name>,
    pub policy: Policy,
    /// Failures in a row that make a name server be passed over; 0: none do.
    pub max_fails: u32,
    /// How often one that failed is looked at.
    pub check_interval: Duration,
    pub tcp: bool,
    /// The longest for which answers and absences are remembered, and how many.
    pub max_ttl: Duration,
    pub max_denial_ttl: Duration,
    pub cache_size: usize,
    /// How long an answer that is too old may stand in where no name server answers.
    pub serve_stale: Duration,
    /// Our own addresses, which would be a loop.
    pub own: Vec<SocketAddr>,
}

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
    settings: Settings,
    upstreams: Mutex<Upstreams>,
    stubs: Vec<(Name, Vec<Arc<Upstream>>)>,
    turn: AtomicUsize,
    cache: Mutex<HashMap<CacheKey, Cached>>,
    telemetry: Telemetry,
}

/// Those of all domains.
struct Upstreams {
    servers: Vec<Arc<Upstream>>,
    /// Followed when none were given.
    resolv_conf: Option<Followed>,
}

/// A name server and how it is.
struct Upstream {
    address: SocketAddr,
    /// In a row.
    fails: AtomicU32,
    is_checked: AtomicBool,
}

// === impl Forwarder ===

impl Forwarder {
    pub(crate) fn new(settings: Settings, telemetry: Telemetry) -> Forwarder {
        let resolv_conf = settings.upstreams.is_empty().then(|| Followed::new(settings.resolv_conf.clone()));
        let servers = settings.upstreams.iter().map(|address| Upstream::new(*address)).collect();
        let mut stubs: Vec<(Name, Vec<Arc<Upstream>>)> = Vec::new();
        for (domain, address) in &settings.stubs {
            match stubs.iter_mut().find(|(known, _)| known == domain) {
                Some((_, servers)) => servers.push(Upstream::new(*address)),
                None => stubs.push((domain.clone(), vec![Upstream::new(*address)])),
            }
        }
        // The longest domain that fits is meant.
        stubs.sort_by_key(|(domain, _)| std::cmp::Reverse(domain.num_labels()));
        Forwarder {
            settings,
            upstreams: Mutex::new(Upstreams { servers, resolv_conf }),
            stubs,
            turn: AtomicUsize::new(0),
            cache: Mutex::default(),
            telemetry,
        }
    }

    /// Upstream's answer to the question; SERVFAIL where none comes.
    pub(crate) async fn ask(&self, query: &Query, dnssec_ok: bool) -> Message {
        if self.settings.except.iter().any(|domain| domain.zone_of(query.name())) {
            return Message::error_msg(0, OpCode::Query, ResponseCode::Refused);
        }
        let key = CacheKey { name: query.name().to_lowercase(), kind: query.query_type(), dnssec_ok };
        let (remembered, entries) = self.remembered(&key, Duration::ZERO);
        self.telemetry.cache(remembered.is_some(), entries);
        if let Some(answer) = remembered {
            return answer;
        }
        match timeout(TOTAL_TIMEOUT, self.ask_upstreams(query, dnssec_ok)).await {
            Ok(Some(answer)) => {
                self.remember(key, &answer);
                answer
            }
            Ok(None) | Err(_) => {
                if let (Some(stale), _) = self.remembered(&key, self.settings.serve_stale) {
                    return stale;
                }
                let failure = Message::error_msg(0, OpCode::Query, ResponseCode::ServFail);
                if self.settings.serve_stale.is_zero() {
                    self.remember(key, &failure);
                }
                failure
            }
        }
    }

    /// A question that must come back if we forward to ourselves; asked once, at the start.
    pub(crate) async fn ask_for_loop(&self, name: &Name) {
        let _ = timeout(TOTAL_TIMEOUT, self.ask_upstreams(&Query::query(name.clone(), RecordType::HINFO), false)).await;
    }

    async fn ask_upstreams(&self, query: &Query, dnssec_ok: bool) -> Option<Message> {
        let mut refused = None;
        for upstream in self.order(query.name()) {
            match ask_one(upstream.address, query, dnssec_ok, self.settings.tcp).await {
                Ok(answer) => {
                    upstream.fails.store(0, Ordering::Relaxed);
                    self.telemetry.forwarded(upstream.address, answer.metadata.response_code);
                    if !matches!(answer.metadata.response_code, ResponseCode::ServFail | ResponseCode::Refused) {
                        return Some(answer);
                    }
                    refused = Some(answer);
                }
                Err(error) => {
                    tracing::debug!(upstream = %upstream.address, %error, name = %query.name(), "no answer");
                    self.failed(&upstream);
                }
            }
        }
        refused
    }

    /// The name servers to ask, one after the other.
    fn order(&self, name: &Name) -> Vec<Arc<Upstream>> {
        let all = match self.stubs.iter().find(|(domain, _)| domain.zone_of(name)) {
            Some((_, servers)) => servers.clone(),
            None => self.upstreams.lock().current(&self.settings.own),
        };
        let is_well = |upstream: &Arc<Upstream>| {
            self.settings.max_fails == 0 || upstream.fails.load(Ordering::Relaxed) < self.settings.max_fails
        };
        let mut order: Vec<Arc<Upstream>> = all.iter().filter(|upstream| is_well(upstream)).cloned().collect();
        if order.is_empty() && !all.is_empty() {
            self.telemetry.health_is_broken();
            order = all;
        }
        if order.len() > 1 {
            let first = match self.settings.policy {
                Policy::Sequential => 0,
                Policy::RoundRobin => self.turn.fetch_add(1, Ordering::Relaxed) % order.len(),
                Policy::Random => rand::random_range(0..order.len()),
            };
            order.rotate_left(first);
        }
        order
    }

    /// From the first failure on its health is looked at, until it answers.
    fn failed(&self, upstream: &Arc<Upstream>) {
        upstream.fails.fetch_add(1, Ordering::Relaxed);
        if self.settings.max_fails > 0 && !upstream.is_checked.swap(true, Ordering::Relaxed) {
            tokio::spawn(check(Arc::downgrade(upstream), self.settings.clone(), self.telemetry.clone()));
        }
    }

    /// What is in memory and at most `more` too old, and how much there is.
    fn remembered(&self, key: &CacheKey, more: Duration) -> (Option<Message>, usize) {
        let cache = self.cache.lock();
        let fresh = |cached: &&Cached| cached.since.elapsed() < cached.life + more;
        let found = cache.get(key).filter(fresh).map(|cached| {
            let mut answer = cached.answer.clone();
            let age = u32::try_from(cached.since.elapsed().as_secs()).unwrap_or(u32::MAX);
            for section in [&mut answer.answers, &mut answer.authorities, &mut answer.additionals] {
                section.iter_mut().for_each(|record| record.ttl = record.ttl.saturating_sub(age));
            }
            answer
        });
        (found, cache.len())
    }

    fn remember(&self, key: CacheKey, answer: &Message) {
        let life = lifetime(answer, self.settings.max_ttl, self.settings.max_denial_ttl);
        if life.is_zero() || self.settings.cache_size == 0 {
            return;
        }
        let mut cache = self.cache.lock();
        if cache.len() >= self.settings.cache_size && !cache.contains_key(&key) {
            cache.retain(|_, cached| cached.since.elapsed() < cached.life);
            if cache.len() >= self.settings.cache_size {
                cache.clear();
            }
        }
        cache.insert(key, Cached { answer: answer.clone(), since: Instant::now(), life });
    }
}

/// Asks a name server for the root's, as CoreDNS does, until it answers or is used no more.
async fn check(upstream: Weak<Upstream>, settings: Settings, telemetry: Telemetry) {
    loop {
        tokio::time::sleep(settings.check_interval).await;
        let Some(upstream) = upstream.upgrade() else { return };
        let question = Query::query(Name::root(), RecordType::NS);
        match ask_one(upstream.address, &question, false, settings.tcp).await {
            // Whatever it says: it is there.
            Ok(_) => {
                upstream.fails.store(0, Ordering::Relaxed);
                upstream.is_checked.store(false, Ordering::Relaxed);
                return;
            }
            Err(error) => {
                upstream.fails.fetch_add(1, Ordering::Relaxed);
                telemetry.check_failed(upstream.address);
                tracing::debug!(upstream = %upstream.address, %error, "name server is not well");
            }
        }
    }
}

/// How long an answer is good: its shortest TTL; for an absence, what the zone's authority says; within bounds.
fn lifetime(answer: &Message, max: Duration, max_denial: Duration) -> Duration {
    let code = answer.metadata.response_code;
    if !matches!(code, ResponseCode::NoError | ResponseCode::NXDomain) {
        return FAILURE_TTL;
    }
    let seconds = |ttl: u32| Duration::from_secs(u64::from(ttl));
    if code == ResponseCode::NoError && !answer.answers.is_empty() {
        let records = answer.answers.iter().chain(&answer.authorities);
        return records.map(|record| seconds(record.ttl)).min().unwrap_or_default().min(max);
    }
    let authority = answer.authorities.iter().find_map(|record| match &record.data {
        RData::SOA(soa) => Some(record.ttl.min(soa.minimum)),
        _ => None,
    });
    // Without it an absence must not be remembered.
    authority.map_or(Duration::ZERO, |ttl| seconds(ttl).min(max_denial))
}

async fn ask_one(upstream: SocketAddr, query: &Query, dnssec_ok: bool, tcp: bool) -> io::Result<Message> {
    let mut request = Message::new(rand::random(), MessageType::Query, OpCode::Query);
    request.metadata.recursion_desired = true;
    request.add_query(query.clone());
    let mut edns = Edns::new();
    edns.set_max_payload(UDP_PAYLOAD);
    edns.set_dnssec_ok(dnssec_ok);
    request.set_edns(edns);
    let bytes = request.to_vec().map_err(io::Error::other)?;
    if !tcp {
        let answer =
            timeout(ATTEMPT_TIMEOUT, over_udp(upstream, &request, &bytes)).await.map_err(io::Error::other)??;
        if !answer.metadata.truncation {
            return Ok(answer);
        }
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

impl Upstream {
    fn new(address: SocketAddr) -> Arc<Upstream> {
        Arc::new(Upstream { address, fails: AtomicU32::new(0), is_checked: AtomicBool::new(false) })
    }
}

impl Upstreams {
    fn current(&mut self, own: &[SocketAddr]) -> Vec<Arc<Upstream>> {
        if let Some(text) = self.resolv_conf.as_mut().and_then(Followed::changed) {
            // One that stays keeps what is known of it.
            let known = |address: SocketAddr| self.servers.iter().find(|s| s.address == address).cloned();
            let addresses = name_servers(&text, own).into_iter();
            self.servers = addresses.map(|at| known(at).unwrap_or_else(|| Upstream::new(at))).collect();
            let upstreams: Vec<SocketAddr> = self.servers.iter().map(|server| server.address).collect();
            tracing::info!(?upstreams, "forwarding");
        }
        self.servers.clone()
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
pub(crate) mod tests {
    use std::str::FromStr;

    use hickory_proto::rr::Record;
    use hickory_proto::rr::rdata::{A, SOA};

    use super::*;

    /// As the flags' defaults, to these name servers.
    pub(crate) fn settings(upstreams: Vec<SocketAddr>) -> Settings {
        Settings {
            upstreams,
            resolv_conf: PathBuf::from("/nonexistent/resolv.conf"),
            stubs: Vec::new(),
            except: Vec::new(),
            policy: Policy::Sequential,
            max_fails: 2,
            check_interval: Duration::from_millis(50),
            tcp: false,
            max_ttl: Duration::from_secs(30),
            max_denial_ttl: Duration::from_secs(30),
            cache_size: 100,
            serve_stale: Duration::ZERO,
            own: Vec::new(),
        }
    }

    fn forwarder(settings: Settings) -> Forwarder {
        Forwarder::new(settings, Telemetry::default())
    }

    fn name(text: &str) -> Name {
        Name::from_str(text).expect("a name")
    }

    fn query(text: &str) -> Query {
        Query::query(name(text), RecordType::A)
    }

    #[test]
    fn name_servers_are_read() {
        let own = [SocketAddr::from(([10, 0, 0, 1], 53))];
        let text = "# x\nsearch a b\nnameserver 1.1.1.1\nnameserver 10.0.0.1\nnameserver\nnameserver fe80::1%eth0\nnameserver ::1\nnameserver 1.1.1.1\n";
        let found: Vec<String> = name_servers(text, &own).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["1.1.1.1:53", "[::1]:53"]);
    }

    fn answer(code: ResponseCode, ttl: Option<u32>, authority: Option<(u32, u32)>) -> Message {
        let mut answer = Message::new(1, MessageType::Response, OpCode::Query);
        answer.metadata.response_code = code;
        answer.answers.extend(ttl.map(|ttl| Record::from_rdata(name("a."), ttl, RData::A(A::new(1, 2, 3, 4)))));
        answer.authorities.extend(authority.map(|(ttl, minimum)| {
            let soa = SOA::new(name("ns."), name("mail."), 1, 1, 1, 1, minimum);
            Record::from_rdata(name("."), ttl, RData::SOA(soa))
        }));
        answer
    }

    #[test]
    fn answers_live_as_long_as_their_shortest_record_and_absences_as_their_zone_says() {
        let (max, denial) = (Duration::from_secs(30), Duration::from_secs(10));
        let cases = [
            (ResponseCode::NoError, Some(7), None, 7),
            (ResponseCode::NoError, Some(3600), None, 30),
            (ResponseCode::NoError, None, None, 0),
            (ResponseCode::NoError, None, Some((9, 5)), 5),
            (ResponseCode::NXDomain, None, Some((4, 60)), 4),
            (ResponseCode::NXDomain, None, Some((3600, 3600)), 10),
            (ResponseCode::NXDomain, None, None, 0),
            (ResponseCode::ServFail, None, None, 2),
        ];
        for (code, ttl, authority, want) in cases {
            assert_eq!(
                lifetime(&answer(code, ttl, authority), max, denial).as_secs(),
                want,
                "{code} {ttl:?} {authority:?}"
            );
        }
    }

    /// A name server that answers, after a forged answer, with its last number; and how often it was asked.
    async fn server(last: u8) -> (SocketAddr, Arc<AtomicUsize>) {
        let upstream = UdpSocket::bind("127.0.0.1:0").await.expect("a socket");
        let address = upstream.local_addr().expect("an address");
        let asked = Arc::new(AtomicUsize::new(0));
        let counter = asked.clone();
        tokio::spawn(async move {
            let mut buffer = [0u8; 1500];
            while let Ok((size, from)) = upstream.recv_from(&mut buffer).await {
                counter.fetch_add(1, Ordering::Relaxed);
                let request = Message::from_vec(&buffer[..size]).expect("a request");
                let mut reply = answer(ResponseCode::NoError, Some(20), None);
                reply.answers[0].data = RData::A(A::new(192, 0, 2, last));
                reply.metadata.id = request.metadata.id;
                reply.add_query(request.queries[0].clone());
                let mut forged = reply.clone();
                forged.metadata.id = forged.metadata.id.wrapping_add(1);
                for message in [forged, reply] {
                    upstream.send_to(&message.to_vec().expect("bytes"), from).await.expect("sent");
                }
            }
        });
        (address, asked)
    }

    fn shown(answer: &Message) -> String {
        answer.answers.first().map_or_else(|| answer.metadata.response_code.to_string(), |r| r.data.to_string())
    }

    #[tokio::test]
    async fn questions_are_asked_once_and_failures_fall_over() {
        let (well, asked) = server(1).await;
        // Nobody listens there any more: it refuses at once.
        let gone = UdpSocket::bind("127.0.0.1:0").await.expect("a socket").local_addr().expect("an address");
        let all = forwarder(settings(vec![gone, well]));
        for (question, times) in [("a.", 1), ("a.", 1), ("A.", 1), ("b.", 2), ("c.", 3)] {
            assert_eq!(
                (shown(&all.ask(&query(question), false).await), asked.load(Ordering::Relaxed)),
                ("192.0.2.1".into(), times)
            );
        }
        let order: Vec<SocketAddr> = all.order(&name("d.")).iter().map(|upstream| upstream.address).collect();
        assert_eq!(order, [well], "what failed twice is passed over");
        let socket = UdpSocket::bind(gone).await.expect("the address again");
        tokio::spawn(async move {
            let mut buffer = [0u8; 1500];
            while let Ok((size, from)) = socket.recv_from(&mut buffer).await {
                let mut reply = Message::from_vec(&buffer[..size]).expect("a request");
                reply.metadata.message_type = MessageType::Response;
                socket.send_to(&reply.to_vec().expect("bytes"), from).await.expect("sent");
            }
        });
        for _ in 0..200 {
            if all.order(&name("d.")).len() == 2 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("a name server that is back is not asked");
    }

    #[tokio::test]
    async fn domains_have_their_name_servers_and_some_have_none() {
        let ((one, _), (two, _), (three, _)) = (server(1).await, server(2).await, server(3).await);
        let stubs = vec![(name("example."), two), (name("deep.example."), three)];
        let all = forwarder(Settings { stubs, except: vec![name("private.")], ..settings(vec![one]) });
        for (question, expected) in [
            ("a.test.", "192.0.2.1"),
            ("a.example.", "192.0.2.2"),
            ("a.deep.example.", "192.0.2.3"),
            ("a.private.", "Query Refused"),
        ] {
            assert_eq!(shown(&all.ask(&query(question), false).await), expected, "{question}");
        }
    }

    #[tokio::test]
    async fn each_policy_has_its_order() {
        let addresses: Vec<SocketAddr> = (1..=3).map(|port| SocketAddr::from(([127, 0, 0, 1], port))).collect();
        for (policy, expected) in [(Policy::Sequential, vec![1, 1, 1, 1]), (Policy::RoundRobin, vec![1, 2, 3, 1])] {
            let all = forwarder(Settings { policy, ..settings(addresses.clone()) });
            let first: Vec<u16> = (0..4).map(|_| all.order(&name("a."))[0].address.port()).collect();
            assert_eq!(first, expected, "{policy:?}");
        }
        let all = forwarder(Settings { policy: Policy::Random, ..settings(addresses) });
        let first: std::collections::BTreeSet<u16> =
            (0..200).map(|_| all.order(&name("a."))[0].address.port()).collect();
        assert_eq!(first.len(), 3);
        all.upstreams.lock().servers.iter().for_each(|upstream| upstream.fails.store(9, Ordering::Relaxed));
        assert_eq!(all.order(&name("a.")).len(), 3, "where none is well all are asked");
    }

    #[tokio::test]
    async fn an_old_answer_stands_in_where_that_is_wanted() {
        for (serve_stale, expected) in [(Duration::ZERO, "Server Failure"), (Duration::from_secs(60), "1.2.3.4")] {
            let all = forwarder(Settings { serve_stale, ..settings(Vec::new()) });
            let key = CacheKey { name: name("a."), kind: RecordType::A, dnssec_ok: false };
            all.remember(key.clone(), &answer(ResponseCode::NoError, Some(20), None));
            all.cache.lock().values_mut().for_each(|cached| cached.life = Duration::ZERO);
            assert_eq!(shown(&all.ask(&query("a."), false).await), expected);
        }
    }
}
