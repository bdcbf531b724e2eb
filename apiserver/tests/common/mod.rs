//! An apiserver over an etcd of its own, for tests, with or without the controllers; all end with the test.
#![allow(dead_code, reason = "each test program uses a part of it")]

pub mod clock;
pub mod conformance;

use base64::Engine as _;
use http::Request;
use serde_json::Value;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

pub const JSON: &str = "application/json";
pub const MERGE: &str = "application/merge-patch+json";
const START_TIMEOUT: Duration = Duration::from_secs(60);
const EVENTUALLY: Duration = Duration::from_secs(60);
pub const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";

/// A process that ends with the test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        _ = self.0.kill();
        _ = self.0.wait();
    }
}

pub struct Server {
    pub client: kube::Client,
    pub url: String,
    controllers: Vec<Process>,
    controller_args: Vec<String>,
    apiserver: Option<Process>,
    args: Vec<String>,
    etcd: Option<Process>,
    etcd_args: Vec<String>,
    pub etcd_url: String,
    /// The certificate and key of a member of `system:masters`.
    admin: (String, String),
    directory: tempfile::TempDir,
}

/// A port that is free and stays so until it is used: below those that the kernel gives to connections, and out of a range
/// that no other test of this run takes from meanwhile (another run's most likely begins elsewhere in it).
pub fn free_port() -> u16 {
    const FIRST: u16 = 12_000;
    const SLOTS: u32 = 18;
    const EACH: u16 = 1_000;
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let slot = std::env::var("NEXTEST_TEST_GLOBAL_SLOT").ok().and_then(|slot| slot.parse().ok());
    let slot = slot.unwrap_or_else(std::process::id) % SLOTS;
    let first = FIRST + u16::try_from(slot).unwrap() * EACH;
    let own = u16::try_from(std::process::id() * 31 % u32::from(EACH)).unwrap();
    let mut ports = (0..EACH).map(|_| first + (own + NEXT.fetch_add(1, Ordering::Relaxed)) % EACH);
    ports.find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok()).expect("a free port")
}

pub fn has_etcd() -> bool {
    let found = Command::new("etcd").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
    if !found {
        assert!(std::env::var_os("CI").is_none(), "etcd is not installed");
        println!("skipped: etcd is not installed");
    }
    found
}

pub fn has_kubectl() -> bool {
    let found = Command::new("kubectl").args(["version", "--client"]).stdout(Stdio::null()).status().is_ok();
    if !found {
        println!("skipped: kubectl is not installed");
    }
    found
}

/// A program of this build: `target/PROFILE/NAME`, as seen from `target/PROFILE/deps/TEST`.
fn built(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.ancestors().nth(2).unwrap().join(name)
}

/// Whether there is all that a control plane is made of.
pub fn has_controllers() -> bool {
    let found = built("controller-manager").exists();
    if !found {
        assert!(std::env::var_os("CI").is_none(), "the controller-manager is not built");
        println!("skipped: the controller-manager is not built; `./test` builds it");
    }
    found && has_etcd()
}

/// Waits until a check passes; it says what it sees instead.
pub async fn eventually<T>(what: &str, check: impl AsyncFn() -> Result<T, String>) -> T {
    let deadline = Instant::now() + EVENTUALLY;
    loop {
        match check().await {
            Ok(value) => return value,
            Err(seen) => assert!(Instant::now() < deadline, "not in time: {what}: {seen}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn spawn(program: &Path, args: &[String], log: &Path) -> Process {
    spawn_in(program, args, &[], log)
}

fn spawn_in(program: &Path, args: &[String], environment: &[(&str, &Path)], log: &Path) -> Process {
    let log = std::fs::File::create(log).unwrap();
    let mut command = Command::new(program);
    command.args(args).envs(environment.iter().copied()).stdout(log.try_clone().unwrap()).stderr(log);
    Process(command.spawn().unwrap_or_else(|e| panic!("{}: {e}", program.display())))
}

impl Server {
    pub async fn start() -> Server {
        Self::start_with(&[]).await
    }

    /// With more flags for the apiserver.
    pub async fn start_with(flags: &[&str]) -> Server {
        Self::start_in(tempfile::tempdir().unwrap(), flags).await
    }

    /// With ServiceAccounts, and with all controllers, each under an account of its own.
    pub async fn start_with_controllers() -> Server {
        let mut server = Self::start_for_controllers().await;
        server.add_controllers(&["--leader-elect=false", "--secure-port=0"]);
        server
    }

    /// As [`Server::start_with_controllers`], but none runs yet.
    pub async fn start_for_controllers() -> Server {
        Self::start_for_controllers_with(&[]).await
    }

    /// As [`Server::start_for_controllers`], with more flags for the apiserver.
    pub async fn start_for_controllers_with(more: &[&str]) -> Server {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str| directory.path().join(name).display().to_string();
        let key = file("sa.key");
        std::fs::write(&key, rcgen::KeyPair::generate().unwrap().serialize_pem()).unwrap();
        let flags = [
            format!("--service-account-issuer={ISSUER}"),
            format!("--service-account-key-file={key}"),
            format!("--service-account-signing-key-file={key}"),
            "--enable-admission-plugins=ServiceAccount".to_owned(),
        ];
        let (ca, ca_key, kubeconfig) = (file("ca.crt"), file("ca.key"), file("admin.conf"));
        let flags: Vec<&str> = flags.iter().map(String::as_str).chain(more.iter().copied()).collect();
        let mut server = Self::start_in(directory, &flags).await;
        let user = serde_json::json!({
            "client-certificate-data": base64(&server.admin.0), "client-key-data": base64(&server.admin.1)});
        let config = serde_json::json!({"apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": server.url, "insecure-skip-tls-verify": true}}],
            "users": [{"name": "c", "user": user}], "contexts": [{"name": "c", "context": {"cluster": "c", "user": "c"}}]});
        std::fs::write(&kubeconfig, config.to_string()).unwrap();
        server.controller_args = vec![
            format!("--kubeconfig={kubeconfig}"),
            "--use-service-account-credentials=true".to_owned(),
            format!("--root-ca-file={ca}"),
            format!("--service-account-private-key-file={key}"),
            format!("--cluster-signing-cert-file={ca}"),
            format!("--cluster-signing-key-file={ca_key}"),
        ];
        server
    }

    /// Starts a controller-manager with more flags; gives its place among those that were started.
    pub fn add_controllers(&mut self, flags: &[&str]) -> usize {
        self.add_controllers_in(&[], flags)
    }

    /// As [`Server::add_controllers`], with an environment.
    pub fn add_controllers_in(&mut self, environment: &[(&str, &Path)], flags: &[&str]) -> usize {
        let args: Vec<String> =
            self.controller_args.iter().cloned().chain(flags.iter().map(ToString::to_string)).collect();
        let log = self.directory.path().join(format!("controller-manager-{}.log", self.controllers.len()));
        self.controllers.push(spawn_in(&built("controller-manager"), &args, environment, &log));
        self.controllers.len() - 1
    }

    /// Ends a controller-manager: asks it to, or kills it.
    pub fn end_controllers(&mut self, which: usize, politely: bool) {
        let process = &mut self.controllers[which].0;
        let signal = if politely { "-TERM" } else { "-KILL" };
        Command::new("kill").args([signal, &process.id().to_string()]).status().unwrap();
        process.wait().unwrap();
    }

    /// What the controllers said, for a test that fails.
    pub fn controllers_log(&self) -> String {
        let log = |which| {
            let path = self.directory.path().join(format!("controller-manager-{which}.log"));
            std::fs::read_to_string(path).unwrap_or_default()
        };
        (0..self.controllers.len()).map(log).collect()
    }

    async fn start_in(directory: tempfile::TempDir, flags: &[&str]) -> Server {
        let path = |name: &str| directory.path().join(name);
        let (client_port, peer_port, port) = (free_port(), free_port(), free_port());
        let (etcd_url, peer_url) = (format!("http://127.0.0.1:{client_port}"), format!("http://127.0.0.1:{peer_port}"));
        let etcd_args = vec![
            format!("--data-dir={}", path("etcd").display()),
            format!("--listen-client-urls={etcd_url}"),
            format!("--advertise-client-urls={etcd_url}"),
            format!("--listen-peer-urls={peer_url}"),
            format!("--initial-advertise-peer-urls={peer_url}"),
            format!("--initial-cluster=default={peer_url}"),
        ];
        let etcd = spawn(Path::new("etcd"), &etcd_args, &path("etcd.log"));
        let mut args = vec![
            format!("--etcd-servers={etcd_url}"),
            "--bind-address=127.0.0.1".to_owned(),
            format!("--secure-port={port}"),
            format!("--cert-dir={}", path("certs").display()),
            format!("--client-ca-file={}", path("ca.crt").display()),
            "--authorization-mode=RBAC".to_owned(),
            "--allow-privileged".to_owned(),
        ];
        if !flags.iter().any(|flag| flag.contains("ServiceAccount")) {
            args.push("--disable-admission-plugins=ServiceAccount".to_owned());
        }
        let admin = admin(&path("ca.crt"));
        args.extend(flags.iter().map(ToString::to_string));
        let apiserver = spawn(&built("apiserver"), &args, &path("apiserver.log"));
        let url = format!("https://127.0.0.1:{port}");
        let client = client(&url, &admin);
        let (apiserver, etcd) = (Some(apiserver), Some(etcd));
        let (controllers, controller_args) = (Vec::new(), Vec::new());
        let server = Server {
            client,
            url,
            controllers,
            controller_args,
            apiserver,
            args,
            etcd,
            etcd_args,
            etcd_url,
            admin,
            directory,
        };
        server.ready().await;
        server
    }

    /// Another apiserver over the same etcd.
    pub async fn sibling(&self) -> Server {
        self.sibling_with(&[]).await
    }

    /// Another apiserver over the same etcd, with some flags otherwise than here.
    pub async fn sibling_with(&self, flags: &[&str]) -> Server {
        let (directory, port) = (tempfile::tempdir().unwrap(), free_port());
        let mut args = self.args.clone();
        for flag in flags.iter().map(ToString::to_string).chain([format!("--secure-port={port}")]) {
            let name = flag.split('=').next().unwrap().to_owned();
            args.retain(|arg| !arg.starts_with(&format!("{name}=")));
            args.push(flag);
        }
        let log = directory.path().join("apiserver.log");
        let apiserver = Some(spawn(&built("apiserver"), &args, &log));
        let url = format!("https://127.0.0.1:{port}");
        let client = client(&url, &self.admin);
        let (etcd_args, etcd_url, admin) = (Vec::new(), self.etcd_url.clone(), self.admin.clone());
        let server = Server {
            client,
            url,
            controllers: Vec::new(),
            controller_args: Vec::new(),
            apiserver,
            args,
            etcd: None,
            etcd_args,
            etcd_url,
            admin,
            directory,
        };
        server.ready().await;
        server
    }

    async fn ready(&self) {
        let deadline = Instant::now() + START_TIMEOUT;
        while let Err(error) = self.client.request_text(Request::get("/readyz").body(Vec::new()).unwrap()).await {
            let log = || std::fs::read_to_string(self.directory.path().join("apiserver.log")).unwrap_or_default();
            assert!(Instant::now() < deadline, "the apiserver is not ready: {error:?} {}", log());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Ends the apiserver with SIGKILL and starts it again.
    pub async fn restart(&mut self) {
        self.apiserver = None;
        let log = self.directory.path().join("apiserver.log");
        self.apiserver = Some(spawn(&built("apiserver"), &self.args, &log));
        self.ready().await;
    }

    /// The process of the apiserver.
    pub fn pid(&self) -> Option<u32> {
        self.apiserver.as_ref().map(|process| process.0.id())
    }

    pub fn etcd_pid(&self) -> Option<u32> {
        self.etcd.as_ref().map(|process| process.0.id())
    }

    pub fn signal(&self, name: &str) {
        signal(self.pid().unwrap(), name);
    }

    /// The sum of a metric's samples.
    pub async fn metric(&self, name: &str) -> f64 {
        let request = Request::get("/metrics").body(Vec::new()).unwrap();
        let text = self.client.request_text(request).await.unwrap();
        let samples = text.lines().filter(|line| line.split(['{', ' ']).next() == Some(name));
        samples.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }

    /// Waits until the apiserver, told to stop, has ended.
    pub fn wait_for_end(&mut self) -> std::process::ExitStatus {
        self.apiserver.as_mut().unwrap().0.wait().unwrap()
    }

    /// For a client of another make.
    pub fn config(&self) -> kube::Config {
        config(&self.url, &self.admin)
    }

    /// For kubectl.
    pub fn kubeconfig(&self) -> String {
        let user = serde_json::json!({"client-certificate-data": base64(&self.admin.0), "client-key-data": base64(&self.admin.1)});
        serde_json::json!({"apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": self.url, "insecure-skip-tls-verify": true}}],
            "users": [{"name": "c", "user": user}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "c"}}]})
        .to_string()
    }

    /// A call of kubectl, in a directory that is its home.
    pub fn kubectl_command(&self, args: &[&str]) -> Command {
        let config = self.directory.path().join("kubeconfig");
        std::fs::write(&config, self.kubeconfig()).unwrap();
        let mut command = Command::new("kubectl");
        command.args(args).env("KUBECONFIG", &config).env("HOME", self.directory.path());
        command
    }

    /// Whether kubectl succeeded, and what it said, given a manifest to read if there is one.
    pub fn kubectl(&self, args: &[&str], manifest: &str) -> (bool, String) {
        let mut command = self.kubectl_command(args);
        if !manifest.is_empty() {
            let file = self.directory.path().join("manifest.yaml");
            std::fs::write(&file, manifest).unwrap();
            command.arg("-f").arg(&file);
        }
        let output = command.output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&said).into_owned())
    }

    /// Code, headers and body of a request with headers of one's own.
    pub async fn raw(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: Vec<u8>,
    ) -> (u16, http::HeaderMap, Vec<u8>) {
        let mut request = Request::builder().method(method).uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = self.client.send(request.body(body.into()).unwrap()).await.unwrap();
        let (parts, body) = response.into_parts();
        let body = http_body_util::BodyExt::collect(body).await.unwrap().to_bytes();
        (parts.status.as_u16(), parts.headers, body.to_vec())
    }

    /// Ends etcd with SIGKILL.
    pub fn kill_etcd(&mut self) {
        self.etcd = None;
    }

    /// Starts it again over what it had written.
    pub fn start_etcd(&mut self) {
        self.etcd = Some(spawn(Path::new("etcd"), &self.etcd_args, &self.directory.path().join("etcd-again.log")));
    }

    /// Makes a namespace.
    pub async fn namespace(&self, name: &str) {
        let namespace = serde_json::json!({"metadata": {"name": name}});
        self.post("/api/v1/namespaces", &namespace).await.unwrap();
    }

    pub async fn post(&self, path: &str, body: &Value) -> Result<Value, (u16, String)> {
        self.call("POST", path, body, JSON).await
    }

    pub async fn merge(&self, path: &str, patch: &Value) -> Result<Value, (u16, String)> {
        self.call("PATCH", path, patch, MERGE).await
    }

    pub async fn delete(&self, path: &str, options: &Value) -> Result<Value, (u16, String)> {
        self.call("DELETE", path, options, JSON).await
    }

    /// The body, or the code of the failure and its message.
    pub async fn call(&self, method: &str, path: &str, body: &Value, kind: &str) -> Result<Value, (u16, String)> {
        let body = if body.is_null() { Vec::new() } else { body.to_string().into_bytes() };
        let request = Request::builder().method(method).uri(path).header("content-type", kind).body(body).unwrap();
        self.client.request::<Value>(request).await.map_err(|error| match error {
            kube::Error::Api(status) => (status.code, status.message.clone()),
            other => (0, other.to_string()),
        })
    }

    pub async fn get(&self, path: &str) -> Result<Value, (u16, String)> {
        self.call("GET", path, &Value::Null, "application/json").await
    }

    /// A request in someone's name.
    pub async fn call_as(
        &self,
        (user, groups): (&str, &[&str]),
        method: &str,
        path: &str,
        body: &Value,
    ) -> Result<Value, (u16, String)> {
        let mut request = Request::builder().method(method).uri(path).header("content-type", JSON);
        request = request.header("impersonate-user", user);
        for group in groups {
            request = request.header("impersonate-group", *group);
        }
        let body = if body.is_null() { Vec::new() } else { body.to_string().into_bytes() };
        self.client.request::<Value>(request.body(body).unwrap()).await.map_err(|error| match error {
            kube::Error::Api(status) => (status.code, status.message.clone()),
            other => (0, other.to_string()),
        })
    }

    pub async fn put(&self, path: &str, body: &Value) -> Result<Value, (u16, String)> {
        self.call("PUT", path, body, JSON).await
    }

    /// The names of a list's items.
    pub async fn names(&self, path: &str) -> Vec<String> {
        let list = self.get(path).await.unwrap();
        let items = list["items"].as_array().cloned().unwrap_or_default();
        items.iter().filter_map(|item| item["metadata"]["name"].as_str().map(ToOwned::to_owned)).collect()
    }

    /// Waits until an object is gone.
    pub async fn gone(&self, path: &str) {
        eventually(&format!("{path} is gone"), async || match self.get(path).await {
            Err((404, _)) => Ok(()),
            other => Err(format!("{other:?}")),
        })
        .await;
    }

    pub async fn table(&self, path: &str) -> Value {
        let accept = "application/json;as=Table;v=v1;g=meta.k8s.io";
        let request = Request::get(path).header("accept", accept).body(Vec::new()).unwrap();
        self.client.request::<Value>(request).await.unwrap()
    }
}

pub fn signal(pid: u32, name: &str) {
    assert!(Command::new("kill").args([format!("-{name}"), pid.to_string()]).status().unwrap().success());
}

fn client(url: &str, admin: &(String, String)) -> kube::Client {
    kube::Client::try_from(config(url, admin)).unwrap()
}

fn config(url: &str, admin: &(String, String)) -> kube::Config {
    _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let mut config = kube::Config::new(url.parse().unwrap());
    config.accept_invalid_certs = true;
    // Refusals are what tests ask about.
    config.default_retry = false;
    config.auth_info.client_certificate_data = Some(base64(&admin.0));
    config.auth_info.client_key_data = Some(base64(&admin.1).into());
    config
}

pub fn base64(text: &str) -> String {
    base64::engine::general_purpose::STANDARD.encode(text)
}

/// The certificate and key of a member of `system:masters`, signed by a CA that is written to a file.
fn admin(authority: &Path) -> (String, String) {
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca = params.self_signed(&ca_key).unwrap();
    std::fs::write(authority, ca.pem()).unwrap();
    std::fs::write(authority.with_extension("key"), ca_key.serialize_pem()).unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name.push(rcgen::DnType::OrganizationName, "system:masters");
    params.distinguished_name.push(rcgen::DnType::CommonName, "admin");
    params.extended_key_usages.push(rcgen::ExtendedKeyUsagePurpose::ClientAuth);
    let issuer = rcgen::Issuer::from_ca_cert_pem(&ca.pem(), ca_key).unwrap();
    (params.signed_by(&key, &issuer).unwrap().pem(), key.serialize_pem())
}
