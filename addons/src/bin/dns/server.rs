//! The sockets: UDP datagrams and TCP connections, bounded in number and time.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::answer::{Answerer, Step, Transport};

const MAX_CONNECTIONS: usize = 256;
/// A connection without a question for so long is closed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);
const MAX_DATAGRAM: usize = 4096;
const ERROR_PAUSE: Duration = Duration::from_millis(50);

/// Both sockets of one address.
pub(crate) struct Sockets {
    udp: Arc<UdpSocket>,
    tcp: TcpListener,
}

// === impl Sockets ===

impl Sockets {
    pub(crate) async fn bind(address: SocketAddr) -> io::Result<Sockets> {
        let udp = UdpSocket::bind(address).await?;
        // With port 0 (tests) both take the same.
        let tcp = TcpListener::bind(udp.local_addr()?).await?;
        Ok(Sockets { udp: Arc::new(udp), tcp })
    }

    pub(crate) fn address(&self) -> io::Result<SocketAddr> {
        self.udp.local_addr()
    }

    /// Answer until shutdown. `pending` is how many questions may be on their way upstream at once.
    pub(crate) async fn serve(self, answerer: Arc<Answerer>, pending: Arc<Semaphore>, shutdown: CancellationToken) {
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = datagrams(self.udp, answerer.clone(), pending) => {}
            () = connections(self.tcp, answerer) => {}
        }
    }
}

async fn datagrams(socket: Arc<UdpSocket>, answerer: Arc<Answerer>, pending: Arc<Semaphore>) {
    let mut buffer = vec![0u8; MAX_DATAGRAM];
    loop {
        let (size, client) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            Err(error) => {
                // Of an earlier send (port unreachable), or the machine is out of memory.
                tracing::debug!(%error, "receiving failed");
                tokio::time::sleep(ERROR_PAUSE).await;
                continue;
            }
        };
        match answerer.begin(&buffer[..size], Transport::Udp) {
            Step::Ignore => {}
            Step::Done(response) => send(&socket, &response, client).await,
            Step::Forward(question) => {
                let Ok(permit) = pending.clone().try_acquire_owned() else {
                    send(&socket, &answerer.refuse(&question), client).await;
                    continue;
                };
                let (socket, answerer) = (socket.clone(), answerer.clone());
                tokio::spawn(async move {
                    let response = answerer.forward(*question).await;
                    send(&socket, &response, client).await;
                    drop(permit);
                });
            }
        }
    }
}

async fn send(socket: &UdpSocket, response: &[u8], client: SocketAddr) {
    if let Err(error) = socket.send_to(response, client).await {
        tracing::debug!(%client, %error, "response not sent");
    }
}

async fn connections(listener: TcpListener, answerer: Arc<Answerer>) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, client)) => {
                let answerer = answerer.clone();
                tokio::spawn(async move {
                    if let Err(error) = connection(stream, &answerer).await {
                        tracing::debug!(%client, %error, "connection ended");
                    }
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "accepting failed");
                tokio::time::sleep(ERROR_PAUSE).await;
            }
        }
    }
}

/// Questions of one connection, one after the other.
async fn connection(mut stream: TcpStream, answerer: &Answerer) -> io::Result<()> {
    loop {
        let length = match timeout(IDLE_TIMEOUT, stream.read_u16()).await {
            Ok(Ok(length)) => length,
            Ok(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Ok(Err(error)) => return Err(error),
            Err(_) => return Ok(()),
        };
        let mut request = vec![0u8; usize::from(length)];
        timeout(IDLE_TIMEOUT, stream.read_exact(&mut request)).await.map_err(io::Error::other)??;
        let response = match answerer.begin(&request, Transport::Tcp) {
            Step::Ignore => return Ok(()),
            Step::Done(response) => response,
            Step::Forward(question) => answerer.forward(*question).await,
        };
        let length = u16::try_from(response.len()).map_err(io::Error::other)?;
        let mut framed = Vec::with_capacity(response.len() + 2);
        framed.extend_from_slice(&length.to_be_bytes());
        framed.extend_from_slice(&response);
        timeout(WRITE_TIMEOUT, stream.write_all(&framed)).await.map_err(io::Error::other)??;
    }
}
