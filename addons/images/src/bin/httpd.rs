//! `httpd`: the demo's web server. It serves one page that names the version of the application, the pod that answers and the
//! client that asked, so that load balancing and rolling updates can be seen; and `/healthz`.
//!
//! A pod that is told to end goes on getting connections until every node has heard of it. So on SIGTERM the server first
//! reports itself unhealthy and goes on serving for a moment, then stops listening, finishes what is in flight, and ends.
//! Every response closes its connection: there is no idle one on which a request could be lost.
#![forbid(unsafe_code)]

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};

const DEFAULT_PORT: u16 = 80;
/// Requests that are answered at once; further connections wait in the listener's backlog.
const MAX_CONCURRENT: usize = 64;
const MAX_HEAD_BYTES: u64 = 16 << 10;
const IO_TIMEOUT: Duration = Duration::from_secs(10);
/// How long connections are still taken after SIGTERM (`DRAIN_SECONDS`).
const DEFAULT_DRAIN: Duration = Duration::from_secs(3);
/// How long requests in flight may take after that.
const FINISH_TIMEOUT: Duration = Duration::from_secs(10);

struct Settings {
    port: u16,
    version: String,
    hostname: String,
    drain: Duration,
}

/// Requests being answered.
#[derive(Default)]
struct InFlight {
    count: Mutex<usize>,
    changed: Condvar,
}

struct Server {
    settings: Settings,
    draining: AtomicBool,
    closed: AtomicBool,
    served: AtomicUsize,
    in_flight: InFlight,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("httpd: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), String> {
    let settings = settings(std::env::args().skip(1), |name| std::env::var(name).ok())?;
    let mut stop = SigSet::empty();
    stop.add(Signal::SIGTERM);
    stop.add(Signal::SIGINT);
    // Before any other thread is there, so that all inherit it.
    stop.thread_block().map_err(|error| format!("signals cannot be blocked: {error}"))?;
    let port = settings.port;
    let listener = TcpListener::bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)))
        .or_else(|_| TcpListener::bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))))
        .map_err(|error| format!("port {port}: {error}"))?;
    let address = listener.local_addr().map_err(|error| error.to_string())?;
    eprintln!("httpd: version {} on {} listens on {address}", settings.version, settings.hostname);
    let server = Arc::new(Server {
        settings,
        draining: AtomicBool::new(false),
        closed: AtomicBool::new(false),
        served: AtomicUsize::new(0),
        in_flight: InFlight::default(),
    });
    let waiting = server.clone();
    std::thread::spawn(move || {
        // An error here is as good as the signal: there is nothing left to wait for.
        let _signal = stop.wait();
        waiting.draining.store(true, Ordering::SeqCst);
        std::thread::sleep(waiting.settings.drain);
        waiting.closed.store(true, Ordering::SeqCst);
        // Wakes the listener, which is blocked in accept.
        let wake = SocketAddr::new(loopback(address.ip()), address.port());
        let _woken = TcpStream::connect_timeout(&wake, Duration::from_secs(1));
    });
    accept(&server, &listener);
    drop(listener);
    let finished = server.in_flight.wait_until_none(FINISH_TIMEOUT);
    eprintln!(
        "httpd: served {} requests; {}",
        server.served.load(Ordering::Relaxed),
        if finished { "done" } else { "some were cut off" }
    );
    Ok(())
}

fn loopback(bound: IpAddr) -> IpAddr {
    if bound.is_ipv6() { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() }
}

/// `--port N` or PORT, VERSION, HOSTNAME, DRAIN_SECONDS.
fn settings(
    mut arguments: impl Iterator<Item = String>,
    env: impl Fn(&str) -> Option<String>,
) -> Result<Settings, String> {
    let number = |name: &str, text: &str| text.parse().map_err(|_| format!("{name}: {text:?} is not a port"));
    let mut port = match env("PORT") {
        Some(text) => number("PORT", &text)?,
        None => DEFAULT_PORT,
    };
    while let Some(argument) = arguments.next() {
        let (name, value) = match argument.split_once('=') {
            Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
            None => (argument, None),
        };
        if name != "--port" {
            return Err(format!("unknown argument {name}; usage: httpd [--port N]"));
        }
        let value = value.or_else(|| arguments.next()).ok_or("--port needs a number")?;
        port = number("--port", &value)?;
    }
    let hostname =
        env("HOSTNAME").or_else(|| std::fs::read_to_string("/etc/hostname").ok()).unwrap_or_else(|| "unknown".into());
    let drain = match env("DRAIN_SECONDS") {
        Some(text) => {
            Duration::from_secs(text.parse().map_err(|_| format!("DRAIN_SECONDS: {text:?} is not a number"))?)
        }
        None => DEFAULT_DRAIN,
    };
    let version = env("VERSION").unwrap_or_else(|| "unknown".into());
    Ok(Settings { port, version, hostname: hostname.trim().to_owned(), drain })
}

fn accept(server: &Arc<Server>, listener: &TcpListener) {
    loop {
        server.in_flight.begin();
        let connection = listener.accept();
        if server.closed.load(Ordering::SeqCst) {
            server.in_flight.end();
            return;
        }
        let Ok((stream, client)) = connection else {
            server.in_flight.end();
            // Out of descriptors, or a client that is gone already.
            std::thread::sleep(Duration::from_millis(10));
            continue;
        };
        let own = server.clone();
        let spawned = std::thread::Builder::new().stack_size(128 << 10).spawn(move || {
            if let Err(error) = answer(&own, stream, client) {
                eprintln!("httpd: {client}: {error}");
            }
            own.in_flight.end();
        });
        if spawned.is_err() {
            server.in_flight.end();
        }
    }
}

fn answer(server: &Server, stream: TcpStream, client: SocketAddr) -> io::Result<()> {
    stream.set_read_timeout(Some(IO_TIMEOUT))?;
    stream.set_write_timeout(Some(IO_TIMEOUT))?;
    let head = match read_head(&stream)? {
        Some(head) => head,
        None => return Ok(()),
    };
    let response = respond(&head, client, &server.settings, server.draining.load(Ordering::SeqCst));
    let mut writer = &stream;
    writer.write_all(&response)?;
    server.served.fetch_add(1, Ordering::Relaxed);
    // Closing with unread input would reset the connection before the client has read the answer.
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut rest = (&stream).take(MAX_HEAD_BYTES);
    io::copy(&mut rest, &mut io::sink()).map(drop)
}

/// The lines of a request's head; `None` where the client closed without asking.
fn read_head(stream: &TcpStream) -> io::Result<Option<Vec<String>>> {
    let mut reader = BufReader::new(stream.take(MAX_HEAD_BYTES));
    let mut lines = Vec::new();
    loop {
        let mut line = Vec::new();
        if reader.read_until(b'\n', &mut line)? == 0 {
            return if lines.is_empty() {
                Ok(None)
            } else {
                Err(io::Error::other("the request's head is too long or cut off"))
            };
        }
        let line = String::from_utf8_lossy(&line).trim_end().to_owned();
        if line.is_empty() {
            return Ok(Some(lines));
        }
        lines.push(line);
    }
}

/// The whole response to a request's head.
fn respond(head: &[String], client: SocketAddr, settings: &Settings, draining: bool) -> Vec<u8> {
    let mut words = head.first().map(|line| line.split(' ')).into_iter().flatten();
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let path = target.split('?').next().unwrap_or_default();
    let wants_html = head.iter().skip(1).any(|line| {
        line.split_once(':')
            .is_some_and(|(name, value)| name.eq_ignore_ascii_case("accept") && value.contains("text/html"))
    });
    let plain = "text/plain; charset=utf-8";
    let (status, content_type, body) = match (method, path) {
        ("GET" | "HEAD", "/healthz") if draining => ("503 Service Unavailable", plain, "ending\n".to_owned()),
        ("GET" | "HEAD", "/healthz") => ("200 OK", plain, "ok\n".to_owned()),
        ("GET" | "HEAD", "/") if wants_html => ("200 OK", "text/html; charset=utf-8", html(client.ip(), settings)),
        ("GET" | "HEAD", "/") => ("200 OK", plain, text(client.ip(), settings)),
        ("GET" | "HEAD", _) => ("404 Not Found", plain, "not found\n".to_owned()),
        _ => ("405 Method Not Allowed", plain, "only GET and HEAD\n".to_owned()),
    };
    let mut response = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {}\r\nServer: httpd-app/{}\r\nConnection: close\r\n\r\n",
        body.len(),
        settings.version
    );
    if method != "HEAD" {
        response.push_str(&body);
    }
    response.into_bytes()
}

fn text(client: IpAddr, settings: &Settings) -> String {
    format!("httpd-app {}\npod: {}\nclient: {}\n", settings.version, settings.hostname, client.to_canonical())
}

fn html(client: IpAddr, settings: &Settings) -> String {
    format!(
        "<!doctype html><title>httpd-app</title><h1>httpd-app {}</h1><p>pod: {}</p><p>client: {}</p>\n",
        escaped(&settings.version),
        escaped(&settings.hostname),
        client.to_canonical()
    )
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

// === impl InFlight ===

impl InFlight {
    /// Wait for a free place and take it.
    fn begin(&self) {
        let count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        let mut count =
            self.changed.wait_while(count, |count| *count >= MAX_CONCURRENT).unwrap_or_else(PoisonError::into_inner);
        *count += 1;
    }

    fn end(&self) {
        *self.count.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.changed.notify_all();
    }

    /// Whether all were done within `patience`.
    fn wait_until_none(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        while *count > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            count = self.changed.wait_timeout(count, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(env: &'static [(&'static str, &'static str)], arguments: &[&str]) -> Result<Settings, String> {
        settings(arguments.iter().map(|argument| (*argument).to_owned()), move |name| {
            env.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        })
    }

    fn ask(request: &str, draining: bool) -> String {
        let settings = given(&[("VERSION", "1.0"), ("HOSTNAME", "pod-a")], &[]).expect("settings");
        let head: Vec<String> = request.lines().map(str::to_owned).collect();
        let client = "[::ffff:10.0.0.9]:5000".parse().expect("an address");
        String::from_utf8(respond(&head, client, &settings, draining)).expect("text")
    }

    #[test]
    fn the_page_names_version_pod_and_client() {
        let page = ask("GET / HTTP/1.1\nHost: x", false);
        assert!(page.starts_with("HTTP/1.1 200 OK\r\n"), "{page}");
        assert!(page.ends_with("\r\n\r\nhttpd-app 1.0\npod: pod-a\nclient: 10.0.0.9\n"), "{page}");
        let page = ask("GET /?x HTTP/1.1\naccept: text/html,*/*", false);
        assert!(page.contains("<h1>httpd-app 1.0</h1>"), "{page}");
    }

    #[test]
    fn other_requests() {
        assert!(ask("GET /healthz HTTP/1.1", false).starts_with("HTTP/1.1 200 OK"));
        assert!(ask("GET /healthz HTTP/1.1", true).starts_with("HTTP/1.1 503"));
        assert!(ask("GET / HTTP/1.1", true).starts_with("HTTP/1.1 200 OK"));
        assert!(ask("GET /none HTTP/1.1", false).starts_with("HTTP/1.1 404"));
        assert!(ask("POST / HTTP/1.1", false).starts_with("HTTP/1.1 405"));
        assert!(ask("HEAD / HTTP/1.1", false).ends_with("\r\n\r\n"));
        assert!(ask("", false).starts_with("HTTP/1.1 405"));
    }

    #[test]
    fn settings_come_from_flag_and_environment() {
        assert_eq!(given(&[], &[]).map(|settings| settings.port), Ok(80));
        assert_eq!(given(&[("PORT", "8080")], &[]).map(|settings| settings.port), Ok(8080));
        assert_eq!(given(&[("PORT", "8080")], &["--port", "81"]).map(|settings| settings.port), Ok(81));
        assert_eq!(given(&[], &["--port=82"]).map(|settings| settings.port), Ok(82));
        assert!(given(&[("PORT", "many")], &[]).is_err());
        assert!(given(&[], &["--verbose"]).is_err());
    }
}
