//! Requests to the application under test: one, or a loop of them that must not see a failure.
use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use crate::Host;

const TIMEOUT: Duration = Duration::from_secs(5);
const BETWEEN: Duration = Duration::from_millis(20);

/// GET / over a connection of its own; the body of a 200, or why not.
pub fn get(address: SocketAddr) -> Result<String, String> {
    let explain = |what: &'static str| move |e: std::io::Error| format!("{what} {address}: {e}");
    let mut stream = TcpStream::connect_timeout(&address, TIMEOUT).map_err(explain("connect to"))?;
    stream.set_read_timeout(Some(TIMEOUT)).map_err(explain("set a timeout for"))?;
    let request = format!("GET / HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).map_err(explain("write to"))?;
    let mut answer = Vec::new();
    stream.take(1 << 20).read_to_end(&mut answer).map_err(explain("read from"))?;
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(|| format!("{address} broke off: {answer:?}"))?;
    if head.starts_with("HTTP/1.1 200") || head.starts_with("HTTP/1.0 200") {
        Ok(body.to_owned())
    } else {
        Err(format!("{address} answered {head}"))
    }
}

/// Requests one after another from a host's network, until it is ended.
pub struct Load {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Report>,
}

/// What a [`Load`] saw.
#[derive(Clone, Debug, Default)]
pub struct Report {
    pub answered: usize,
    /// The first failures, with their time since the start.
    pub failures: Vec<String>,
    /// The longest time without an answer.
    pub longest_gap: Duration,
}

impl Load {
    pub fn start(host: &Host, ip: IpAddr, port: u16) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = host.in_network(move || {
            let (started, mut last) = (Instant::now(), Instant::now());
            let mut report = Report::default();
            while !stopped.load(Ordering::Relaxed) {
                match get(SocketAddr::new(ip, port)) {
                    Ok(_) => {
                        report.answered += 1;
                        report.longest_gap = report.longest_gap.max(last.elapsed());
                        last = Instant::now();
                    }
                    Err(error) if report.failures.len() < 100 => {
                        report.failures.push(format!("{:.1} s: {error}", started.elapsed().as_secs_f64()));
                    }
                    Err(_) => {}
                }
                std::thread::sleep(BETWEEN);
            }
            report
        });
        Self { stop, thread }
    }

    pub fn end(self) -> Report {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the load's thread")
    }
}
