//! A stand-in for the API server: lists and watches of a few objects over plain HTTP/1.1, on a thread of its own.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Objects by the path of their collection, and the events since the start.
#[derive(Default)]
struct State {
    objects: HashMap<String, HashMap<String, Value>>,
    events: Vec<(String, Value)>,
    /// Nobody is answered, and whoever listened is left.
    away: bool,
}

#[derive(Clone)]
pub struct FakeApi {
    pub address: SocketAddr,
    state: Arc<(Mutex<State>, Condvar)>,
}

// === impl FakeApi ===

impl FakeApi {
    /// Listens on a free port of the calling thread's network namespace.
    pub fn start() -> FakeApi {
        FakeApi::start_at([127, 0, 0, 1])
    }

    pub fn start_at(address: [u8; 4]) -> FakeApi {
        let listener = TcpListener::bind(SocketAddr::from((address, 0))).expect("a port");
        let api = FakeApi { address: listener.local_addr().expect("an address"), state: Arc::default() };
        let served = api.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten().filter(|_| !served.is_away()) {
                let api = served.clone();
                std::thread::spawn(move || api.connection(stream));
            }
        });
        api
    }

    /// A kubeconfig for it.
    pub fn kubeconfig(&self, directory: &Path) -> PathBuf {
        let path = directory.join("kubeconfig");
        let text = format!(
            "apiVersion: v1\nkind: Config\nclusters: [{{name: c, cluster: {{server: 'http://{}'}}}}]\n\
             contexts: [{{name: c, context: {{cluster: c, user: u}}}}]\ncurrent-context: c\nusers: [{{name: u, user: {{}}}}]\n",
            self.address
        );
        std::fs::write(&path, text).expect("written");
        path
    }

    /// Create or change an object of the collection at `path` (`/api/v1/services`).
    pub fn apply(&self, path: &str, mut object: Value) {
        let (state, changed) = &*self.state;
        let mut state = state.lock().expect("the state");
        let version = (state.events.len() + 1).to_string();
        object["metadata"]["resourceVersion"] = json!(version);
        let meta = &object["metadata"];
        let key =
            format!("{}/{}", meta["namespace"].as_str().unwrap_or_default(), meta["name"].as_str().expect("a name"));
        let before = state.objects.entry(path.to_owned()).or_default().insert(key, object.clone());
        let kind = if before.is_some() { "MODIFIED" } else { "ADDED" };
        state.events.push((path.to_owned(), json!({"type": kind, "object": object})));
        changed.notify_all();
    }

    /// As if the server's machine were switched off, and on again.
    pub fn go_away(&self, away: bool) {
        self.state.0.lock().expect("the state").away = away;
        self.state.1.notify_all();
    }

    fn is_away(&self) -> bool {
        self.state.0.lock().expect("the state").away
    }

    pub fn delete(&self, path: &str, namespace: &str, name: &str) {
        let (state, changed) = &*self.state;
        let mut state = state.lock().expect("the state");
        let object = state.objects.get_mut(path).and_then(|objects| objects.remove(&format!("{namespace}/{name}")));
        state.events.push((path.to_owned(), json!({"type": "DELETED", "object": object.expect("an object")})));
        changed.notify_all();
    }

    fn connection(&self, stream: TcpStream) {
        let mut reader = BufReader::new(stream.try_clone().expect("a stream"));
        loop {
            let mut request = String::new();
            if reader.read_line(&mut request).unwrap_or(0) == 0 {
                return;
            }
            let mut length = 0;
            loop {
                let mut header = String::new();
                if reader.read_line(&mut header).unwrap_or(0) == 0 || header.trim().is_empty() {
                    break;
                }
                if let Some(value) = header.to_lowercase().strip_prefix("content-length:") {
                    length = value.trim().parse().unwrap_or(0);
                }
            }
            let mut body = vec![0; length];
            if std::io::Read::read_exact(&mut reader, &mut body).is_err() {
                return;
            }
            if self.is_away() {
                return;
            }
            let target = request.split(' ').nth(1).unwrap_or_default().to_owned();
            let (path, query) = target.split_once('?').unwrap_or((&target, ""));
            if query.contains("watch=true") {
                let since = query.split('&').find_map(|item| item.strip_prefix("resourceVersion=")?.parse().ok());
                let since = since.filter(|_| !query.contains("sendInitialEvents=true"));
                self.watch(stream, path, since);
                return;
            }
            let answer = if request.starts_with("GET") { self.list(path).to_string() } else { "{}".to_owned() };
            let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length";
            if (&stream).write_all(format!("{head}: {}\r\n\r\n{answer}", answer.len()).as_bytes()).is_err() {
                return;
            }
        }
    }

    fn list(&self, path: &str) -> Value {
        let state = self.state.0.lock().expect("the state");
        let items: Vec<&Value> = state.objects.get(path).into_iter().flat_map(HashMap::values).collect();
        json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": state.events.len().to_string()}, "items": items})
    }

    /// The events behind `since`; without it what is there first, as a streamed list.
    fn watch(&self, mut stream: TcpStream, path: &str, since: Option<usize>) {
        let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n";
        if stream.write_all(head.as_bytes()).is_err() {
            return;
        }
        let mut send = |event: &Value| {
            let line = format!("{event}\n");
            stream.write_all(format!("{:x}\r\n{line}\r\n", line.len()).as_bytes()).is_ok()
        };
        let (state, changed) = &*self.state;
        let mut sent = since.unwrap_or_else(|| state.lock().expect("the state").events.len());
        if since.is_none() {
            let list = self.list(path);
            let objects = list["items"].as_array().into_iter().flatten();
            let of_first = objects.clone().next().unwrap_or(&list);
            let end = json!({"apiVersion": of_first["apiVersion"], "kind": of_first["kind"], "metadata": {
                "resourceVersion": sent.to_string(), "annotations": {"k8s.io/initial-events-end": "true"}}});
            if !objects.into_iter().all(|object| send(&json!({"type": "ADDED", "object": object})))
                || !send(&json!({"type": "BOOKMARK", "object": end}))
            {
                return;
            }
        }
        loop {
            let events: Vec<Value> = {
                let state = state.lock().expect("the state");
                let nothing = |state: &mut State| state.events.len() <= sent && !state.away;
                let state = changed.wait_while(state, nothing).expect("the state");
                if state.away {
                    return;
                }
                let new =
                    state.events[sent..].iter().filter(|(at, _)| at == path).map(|(_, event)| event.clone()).collect();
                sent = state.events.len();
                new
            };
            if !events.iter().all(&mut send) {
                return;
            }
        }
    }
}

/// A program under test, ended with the test.
pub struct Program(pub std::process::Child);

impl Drop for Program {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// Wait until `check` gives something, at most a minute.
pub fn eventually<T>(what: &str, mut check: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(found) = check() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}: not within a minute");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The whole answer to a GET; none if nobody listens.
pub fn http(address: SocketAddr, path: &str) -> Option<String> {
    use std::io::Read;
    let mut stream = TcpStream::connect(address).ok()?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    Some(answer)
}
