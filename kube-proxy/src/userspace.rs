//! The mode userspace: this process forwards by itself, where the kernel has no packet rewriting. It listens on the
//! Services' addresses, which are put on a link of its own, and hands connections and datagrams on, to one endpoint after
//! another. TCP and UDP; endpoints see this node's address.
use crate::{
    link,
    model::{Endpoint, Protocol, ServicePort},
    settings::Settings,
};
use component_base::{cidr::Cidr, command::CommandError};
use parking_lot::{Mutex, RwLock};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io::ErrorKind,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream, UdpSocket},
    sync::Semaphore,
    task::JoinHandle,
    time::timeout,
};
use tracing::{debug, warn};

/// The link that has the Services' addresses.
pub const LINK: &str = "kube-proxy0";
/// Connections of one frontend at once; more wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 1024;
const BACKLOG: u32 = 1024;
/// Clients of one UDP frontend that are remembered at once; who has been silent longest makes way.
const MAX_UDP_CLIENTS: usize = 1024;
const MAX_AFFINITY: usize = 10_000;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A UDP client that is silent for so long is forgotten.
const UDP_IDLE: Duration = Duration::from_secs(60);
const MAX_DATAGRAM: usize = 65_535;
const ERROR_PAUSE: Duration = Duration::from_millis(100);

/// One address family's frontends.
#[derive(Default)]
pub struct Forwarder {
    frontends: Frontends<Frontend>,
    /// How many ports want each address on the link.
    addresses: BTreeMap<IpAddr, usize>,
    /// This node's own, as they were when last looked at.
    node_addresses: BTreeSet<IpAddr>,
}

/// By where they listen.
type Frontends<T> = BTreeMap<(SocketAddr, Protocol), T>;

struct Frontend {
    backends: Arc<Backends>,
    task: JoinHandle<()>,
}

/// Where a frontend sends its clients; changes while it runs.
#[derive(Default)]
struct Backends {
    set: RwLock<Target>,
    next: AtomicUsize,
    /// Who went where, and when last.
    affinity: Mutex<HashMap<IpAddr, (SocketAddr, Instant)>>,
}

/// What a frontend should do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Target {
    pub endpoints: Vec<SocketAddr>,
    pub affinity: Option<Duration>,
    /// Who may speak to it; empty for everybody.
    pub sources: Vec<Cidr>,
}

/// The frontends of the ports: where to listen, and for whom. Where nobody answers none listens, and the kernel refuses.
pub fn plan<'a>(
    ports: impl IntoIterator<Item = &'a ServicePort>,
    settings: &Settings,
    node_addresses: &BTreeSet<IpAddr>,
) -> (Frontends<Target>, BTreeMap<IpAddr, usize>) {
    let (mut frontends, mut addresses) = (BTreeMap::new(), BTreeMap::new());
    for port in ports {
        let target = |endpoints: &[Endpoint], sources: &[Cidr]| Target {
            endpoints: endpoints.iter().map(Endpoint::socket).collect(),
            affinity: port.affinity_seconds.map(|s| Duration::from_secs(u64::from(s))),
            sources: sources.to_vec(),
        };
        let mut put = |address: IpAddr, number: u16, target: Target| {
            if !target.endpoints.is_empty() {
                frontends.insert((SocketAddr::new(address, number), port.id.protocol), target);
            }
        };
        put(port.cluster_ip, port.port, target(port.internal(), &[]));
        for address in &port.external_ips {
            put(*address, port.port, target(port.external(), &[]));
        }
        for address in &port.load_balancer_ips {
            put(*address, port.port, target(port.external(), &port.source_ranges));
        }
        if port.node_port != 0 {
            for address in node_addresses.iter().filter(|address| settings.takes_node_ports(**address)) {
                put(*address, port.node_port, target(port.external(), &[]));
            }
        }
        for address in std::iter::once(port.cluster_ip).chain(port.outer_ips()) {
            if !node_addresses.contains(&address) {
                *addresses.entry(address).or_default() += 1;
            }
        }
    }
    (frontends, addresses)
}

impl Forwarder {
    /// Listens where these ports want it, and nowhere else. Connections that are open go on.
    pub async fn replace<'a>(
        &mut self,
        ports: impl IntoIterator<Item = &'a ServicePort>,
        settings: &Settings,
    ) -> Result<(), CommandError> {
        self.node_addresses = link::node_addresses(LINK, settings.ipv6).await?;
        let (wanted, addresses) = plan(ports, settings, &self.node_addresses);
        link::ensure(LINK).await?;
        // With what an earlier process has left.
        let present = link::addresses(LINK, settings.ipv6).await?;
        link::change(LINK, &present, &addresses.keys().copied().collect()).await?;
        self.addresses = addresses;
        self.frontends.retain(|key, frontend| {
            let kept = wanted.contains_key(key) && !frontend.task.is_finished();
            if !kept {
                frontend.task.abort();
            }
            kept
        });
        self.serve(wanted).await;
        Ok(())
    }

    /// As [`Self::replace`], from the ports `old` to the ports `new`.
    pub async fn update<'a>(
        &mut self,
        old: impl IntoIterator<Item = &'a ServicePort>,
        new: impl IntoIterator<Item = &'a ServicePort>,
        settings: &Settings,
    ) -> Result<(), CommandError> {
        let (before, gone) = plan(old, settings, &self.node_addresses);
        let (after, come) = plan(new, settings, &self.node_addresses);
        let touched: BTreeSet<IpAddr> = gone.keys().chain(come.keys()).copied().collect();
        let count = |of: &BTreeMap<IpAddr, usize>, address: &IpAddr| of.get(address).copied().unwrap_or(0);
        let left = |address: &IpAddr| {
            let counts = (count(&self.addresses, address), count(&come, address), count(&gone, address));
            (*address, (counts.0 + counts.1).saturating_sub(counts.2))
        };
        let left: BTreeMap<IpAddr, usize> = touched.iter().map(left).collect();
        let there = touched.into_iter().filter(|address| self.addresses.contains_key(address)).collect();
        let wanted = left.iter().filter(|(_, count)| **count > 0).map(|(address, _)| *address).collect();
        link::change(LINK, &there, &wanted).await?;
        for (address, count) in left {
            match count {
                0 => drop(self.addresses.remove(&address)),
                _ => drop(self.addresses.insert(address, count)),
            }
        }
        for key in before.keys().filter(|key| !after.contains_key(*key)) {
            if let Some(frontend) = self.frontends.remove(key) {
                frontend.task.abort();
            }
        }
        self.serve(after).await;
        Ok(())
    }

    async fn serve(&mut self, wanted: Frontends<Target>) {
        for ((address, protocol), target) in wanted {
            if let Some(frontend) = self.frontends.get(&(address, protocol)) {
                if *frontend.backends.set.read() != target {
                    *frontend.backends.set.write() = target;
                }
                continue;
            }
            let backends = Arc::new(Backends { set: RwLock::new(target), ..Backends::default() });
            let task = match protocol {
                Protocol::Tcp => listen(address).map(|listener| tokio::spawn(connections(listener, backends.clone()))),
                Protocol::Udp => match UdpSocket::bind(address).await {
                    Ok(socket) => Ok(tokio::spawn(datagrams(Arc::new(socket), backends.clone()))),
                    Err(error) => Err(error),
                },
                Protocol::Sctp => Err(std::io::Error::other("SCTP is not forwarded in the mode userspace")),
            };
            match task {
                Ok(task) => drop(self.frontends.insert((address, protocol), Frontend { backends, task })),
                // One port that somebody else has must not keep the others from being served.
                Err(error) => warn!(%address, protocol = protocol.as_str(), %error, "cannot listen for a Service"),
            }
        }
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        self.frontends.values().for_each(|frontend| frontend.task.abort());
    }
}

fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

// === impl Backends ===

impl Backends {
    fn admits(&self, client: IpAddr) -> bool {
        let set = self.set.read();
        set.sources.is_empty() || set.sources.iter().any(|range| range.contains(client))
    }

    /// Where a client is sent: where it was before under session affinity, else round robin.
    fn pick(&self, client: IpAddr, now: Instant) -> Option<SocketAddr> {
        let set = self.set.read();
        let lasting = set.affinity;
        if let Some(limit) = lasting
            && let Some((endpoint, last)) = self.affinity.lock().get_mut(&client)
            && now.duration_since(*last) < limit
            && set.endpoints.contains(endpoint)
        {
            *last = now;
            return Some(*endpoint);
        }
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        let chosen = *set.endpoints.get(turn.checked_rem(set.endpoints.len())?)?;
        if let Some(limit) = lasting {
            let mut known = self.affinity.lock();
            if known.len() >= MAX_AFFINITY {
                known.retain(|_, (_, last)| now.duration_since(*last) < limit);
            }
            if known.len() < MAX_AFFINITY {
                known.insert(client, (chosen, now));
            }
        }
        Some(chosen)
    }

    /// A connection to an endpoint; one that does not answer is passed over.
    async fn connect(&self, client: IpAddr) -> Option<TcpStream> {
        let attempts = self.set.read().endpoints.len();
        for _ in 0..attempts {
            let endpoint = self.pick(client, Instant::now())?;
            match timeout(CONNECT_TIMEOUT, TcpStream::connect(endpoint)).await {
                Ok(Ok(stream)) => return Some(stream),
                Ok(Err(error)) => debug!(%endpoint, %error, "endpoint does not answer"),
                Err(_) => debug!(%endpoint, "endpoint does not answer in time"),
            }
            self.affinity.lock().remove(&client);
        }
        None
    }
}

async fn connections(listener: TcpListener, backends: Arc<Backends>) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        let (mut inner, client) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ERROR_PAUSE).await;
                continue;
            }
        };
        let client = client.ip().to_canonical();
        if !backends.admits(client) {
            continue;
        }
        let backends = backends.clone();
        // Not ended with the frontend: a connection outlives changes of its Service.
        tokio::spawn(async move {
            let _slot = slot;
            if let Some(mut outer) = backends.connect(client).await {
                // Either end may break it off at any time.
                let _ = tokio::io::copy_bidirectional(&mut inner, &mut outer).await;
            }
        });
    }
}

/// A client of a UDP frontend: the socket by which it speaks to its endpoint.
struct Session {
    endpoint: SocketAddr,
    socket: Arc<UdpSocket>,
    back: JoinHandle<()>,
    used: Instant,
}

async fn datagrams(socket: Arc<UdpSocket>, backends: Arc<Backends>) {
    let mut sessions: HashMap<SocketAddr, Session> = HashMap::new();
    while socket.readable().await.is_ok() {
        let (datagram, client) = match receive(&socket) {
            Ok(received) => received,
            Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
            // Of an earlier send (port unreachable), or the machine is out of memory.
            Err(error) => {
                debug!(%error, "receiving failed");
                continue;
            }
        };
        if !backends.admits(client.ip()) {
            continue;
        }
        let is_good = |s: &Session| !s.back.is_finished() && backends.set.read().endpoints.contains(&s.endpoint);
        if !sessions.get(&client).is_some_and(is_good) {
            if sessions.len() >= MAX_UDP_CLIENTS {
                make_room(&mut sessions, MAX_UDP_CLIENTS);
            }
            let Some(endpoint) = backends.pick(client.ip(), Instant::now()) else { continue };
            match Session::start(endpoint, client, socket.clone()) {
                Ok(session) => drop(sessions.insert(client, session)),
                Err(error) => {
                    warn!(%endpoint, %error, "cannot speak to an endpoint");
                    continue;
                }
            }
        }
        if let Some(session) = sessions.get_mut(&client) {
            session.used = Instant::now();
            if let Err(error) = session.socket.send(&datagram).await {
                debug!(endpoint = %session.endpoint, %error, "datagram not passed on");
            }
        }
    }
}

/// One datagram. The buffer is of the stack: no frontend holds one while it waits.
fn receive(socket: &UdpSocket) -> std::io::Result<(Vec<u8>, SocketAddr)> {
    let mut buffer = [0; MAX_DATAGRAM];
    let (size, client) = socket.try_recv_from(&mut buffer)?;
    Ok((buffer[..size].to_vec(), client))
}

/// Forgets the clients that are silent, or, if there are none, a share of those that are silent longest.
fn make_room(sessions: &mut HashMap<SocketAddr, Session>, limit: usize) {
    sessions.retain(|_, session| !session.back.is_finished());
    if sessions.len() < limit {
        return;
    }
    let mut used: Vec<Instant> = sessions.values().map(|session| session.used).collect();
    let (_, silent, _) = used.select_nth_unstable(limit / 8);
    let silent = *silent;
    sessions.retain(|_, session| session.used > silent);
}

impl Session {
    fn start(endpoint: SocketAddr, client: SocketAddr, front: Arc<UdpSocket>) -> std::io::Result<Self> {
        let any: IpAddr = if endpoint.is_ipv4() { [0; 4].into() } else { [0u16; 8].into() };
        let socket = std::net::UdpSocket::bind((any, 0))?;
        socket.connect(endpoint)?;
        socket.set_nonblocking(true)?;
        let socket = Arc::new(UdpSocket::from_std(socket)?);
        let own = socket.clone();
        let back = tokio::spawn(async move {
            while let Ok(Ok(())) = timeout(UDP_IDLE, own.readable()).await {
                let mut buffer = [0; MAX_DATAGRAM];
                match own.try_recv(&mut buffer).and_then(|size| front.try_send_to(&buffer[..size], client)) {
                    Ok(_) => {}
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    Err(_) => break,
                }
            }
        });
        Ok(Self { endpoint, socket, back, used: Instant::now() })
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.back.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{model::tests::gallery, settings::tests::settings};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    #[test]
    fn all_that_the_model_can_say() {
        let node = BTreeSet::from(["192.0.2.1".parse().unwrap(), "127.0.0.1".parse().unwrap()]);
        let (frontends, addresses) = plan(&gallery(), &settings(), &node);
        let lines: Vec<String> = frontends
            .iter()
            .map(|((at, protocol), target)| format!("{at} {} -> {:?}", protocol.as_str(), target))
            .chain(addresses.keys().map(|address| format!("address {address}")))
            .collect();
        insta::assert_snapshot!(lines.join("\n"));
    }

    #[test]
    fn clients_take_turns_and_stay_where_they_were_under_affinity() {
        let endpoints: Vec<SocketAddr> = ["10.0.0.1:1", "10.0.0.2:1"].map(|a| a.parse().unwrap()).to_vec();
        let now = Instant::now();
        let [a, b] = [1, 2].map(|last| IpAddr::from([192, 0, 2, last]));
        let backends = Backends::default();
        backends.set.write().endpoints = endpoints.clone();
        let turns: Vec<_> = (0..3).filter_map(|_| backends.pick(a, now)).collect();
        assert_eq!(turns, [endpoints[0], endpoints[1], endpoints[0]]);
        backends.set.write().affinity = Some(Duration::from_secs(10));
        let (first, other) = (backends.pick(a, now), backends.pick(b, now));
        assert!(first != other && backends.pick(a, now + Duration::from_secs(9)) == first);
        assert_eq!(backends.pick(a, now + Duration::from_secs(18)), first, "each use renews it");
        backends.set.write().endpoints.retain(|e| Some(*e) != first);
        assert_ne!(backends.pick(a, now), first);
        backends.set.write().endpoints.clear();
        assert_eq!(backends.pick(b, now), None);
    }

    #[tokio::test]
    async fn who_is_silent_longest_makes_way() {
        let front = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
        let client = |n: usize| SocketAddr::from(([192, 0, 2, 1], n as u16 + 1));
        let mut sessions = HashMap::new();
        let limit = 64;
        for n in 0..limit {
            let mut session = Session::start("127.0.0.1:9".parse().unwrap(), client(n), front.clone()).unwrap();
            session.used += Duration::from_secs(n as u64);
            sessions.insert(client(n), session);
        }
        make_room(&mut sessions, limit);
        assert!(sessions.len() < limit && sessions.len() > limit / 2);
        assert!(!sessions.contains_key(&client(0)) && sessions.contains_key(&client(limit - 1)));
    }

    #[test]
    fn an_address_stays_as_long_as_a_port_wants_it() {
        let mut shared = gallery()[3].clone();
        shared.id.name = "other".into();
        let (_, addresses) = plan([&gallery()[3], &shared], &settings(), &BTreeSet::new());
        assert_eq!(addresses["198.51.100.7".parse::<IpAddr>().as_ref().unwrap()], 2);
    }

    #[tokio::test]
    async fn connections_and_datagrams_go_there_and_back() {
        let echo = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let silent = SocketAddr::from(([127, 0, 0, 1], 1));
        let backends = Arc::new(Backends::default());
        backends.set.write().endpoints = vec![silent, echo.local_addr().unwrap()];
        let front = listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let at = front.local_addr().unwrap();
        tokio::spawn(connections(front, backends.clone()));
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = echo.accept().await {
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            }
        });
        let mut stream = TcpStream::connect(at).await.unwrap();
        stream.write_all(b"hello").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "hello", "the endpoint that refuses is passed over");

        let echo = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        backends.set.write().endpoints = vec![echo.local_addr().unwrap()];
        let front = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let at = front.local_addr().unwrap();
        tokio::spawn(datagrams(Arc::new(front), backends));
        let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        client.send_to(b"ping", at).await.unwrap();
        let mut buffer = [0; 16];
        let (size, from) = echo.recv_from(&mut buffer).await.unwrap();
        echo.send_to(&buffer[..size], from).await.unwrap();
        let (size, from) = client.recv_from(&mut buffer).await.unwrap();
        assert_eq!((&buffer[..size], from), (&b"ping"[..], at));
    }
}
