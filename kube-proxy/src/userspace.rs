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
/// Clients of one UDP frontend that are remembered at once; what is over is dropped, as a full network would.
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
    frontends: BTreeMap<(SocketAddr, Protocol), Frontend>,
    addresses: BTreeSet<IpAddr>,
}

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
) -> (BTreeMap<(SocketAddr, Protocol), Target>, BTreeSet<IpAddr>) {
    let (mut frontends, mut addresses) = (BTreeMap::new(), BTreeSet::new());
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
        let own = std::iter::once(port.cluster_ip).chain(port.outer_ips());
        addresses.extend(own.filter(|address| !node_addresses.contains(address)));
    }
    (frontends, addresses)
}

impl Forwarder {
    /// Listens where these ports want it, and nowhere else. Connections that are open go on.
    pub async fn apply(&mut self, ports: &[Arc<ServicePort>], settings: &Settings) -> Result<(), CommandError> {
        let node_addresses = link::node_addresses(LINK, settings.ipv6).await?;
        let (wanted, addresses) = plan(ports.iter().map(AsRef::as_ref), settings, &node_addresses);
        link::ensure(LINK).await?;
        if self.addresses.is_empty() {
            // What an earlier process has left.
            self.addresses = link::addresses(LINK, settings.ipv6).await?;
        }
        link::change(LINK, &self.addresses, &addresses).await?;
        self.addresses = addresses;
        self.frontends.retain(|key, frontend| {
            let kept = wanted.contains_key(key) && !frontend.task.is_finished();
            if !kept {
                frontend.task.abort();
            }
            kept
        });
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
        Ok(())
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
}

async fn datagrams(socket: Arc<UdpSocket>, backends: Arc<Backends>) {
    let mut sessions: HashMap<SocketAddr, Session> = HashMap::new();
    let mut buffer = vec![0; MAX_DATAGRAM];
    loop {
        let (size, client) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            Err(error) => {
                // Of an earlier send (port unreachable), or the machine is out of memory.
                debug!(%error, "receiving failed");
                tokio::time::sleep(ERROR_PAUSE).await;
                continue;
            }
        };
        if !backends.admits(client.ip()) {
            continue;
        }
        let is_good = |s: &Session| !s.back.is_finished() && backends.set.read().endpoints.contains(&s.endpoint);
        if !sessions.get(&client).is_some_and(is_good) {
            sessions.retain(|_, session| !session.back.is_finished());
            if sessions.len() >= MAX_UDP_CLIENTS {
                continue;
            }
            let Some(endpoint) = backends.pick(client.ip(), Instant::now()) else { continue };
            match Session::start(endpoint, client, socket.clone()).await {
                Ok(session) => drop(sessions.insert(client, session)),
                Err(error) => {
                    warn!(%endpoint, %error, "cannot speak to an endpoint");
                    continue;
                }
            }
        }
        if let Some(session) = sessions.get(&client)
            && let Err(error) = session.socket.send(&buffer[..size]).await
        {
            debug!(endpoint = %session.endpoint, %error, "datagram not passed on");
        }
    }
}

impl Session {
    async fn start(endpoint: SocketAddr, client: SocketAddr, front: Arc<UdpSocket>) -> std::io::Result<Self> {
        let any: IpAddr = if endpoint.is_ipv4() { [0; 4].into() } else { [0u16; 8].into() };
        let socket = Arc::new(UdpSocket::bind((any, 0)).await?);
        socket.connect(endpoint).await?;
        let own = socket.clone();
        let back = tokio::spawn(async move {
            let mut buffer = vec![0; MAX_DATAGRAM];
            while let Ok(Ok(size)) = timeout(UDP_IDLE, own.recv(&mut buffer)).await {
                if front.send_to(&buffer[..size], client).await.is_err() {
                    break;
                }
            }
        });
        Ok(Self { endpoint, socket, back })
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
            .chain(addresses.iter().map(|address| format!("address {address}")))
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
