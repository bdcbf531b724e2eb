//! The kubelet's HTTPS server: pods, logs, exec, attach, port-forward, stats and metrics, for the API server and whoever it
//! lets. Each request is authenticated and authorized as a verb on a subresource of this node.

mod logs;
mod stats;
mod streaming;
pub(crate) mod tls;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use apimachinery::status::StatusError;
use component_base::auth::{Access, DelegatedAuth};
use component_base::serving::{self, Request, Response};
use http::{Method, StatusCode};
use k8s_openapi::api::core::v1::Pod;
use serde_json::json;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use crate::config::KubeletConfiguration;
use crate::metrics::{Asked, metrics};
use crate::pod_workers::PodWorkers;
use crate::runtime::observed::{ObservedPod, State};
use crate::runtime::pods::{find_container, uid_of};
use crate::runtime::{Runtime, RuntimeWatch};

/// What `/logs/` shows.
const SYSTEM_LOGS: &str = "/var/log";
const MAX_CONNECTIONS: usize = 1024;
/// How long a command may take whose output is one answer.
const RUN_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(120);

/// What the server shows and does things with.
pub struct Parts {
    pub config: Arc<KubeletConfiguration>,
    pub workers: Arc<PodWorkers>,
    pub runtime: Arc<Runtime>,
    pub watch: Arc<RuntimeWatch>,
    pub client: Option<kube::Client>,
    pub node_name: String,
}

pub(crate) struct Server {
    parts: Parts,
    auth: DelegatedAuth,
    endpoints: serving::Endpoints,
    stats: stats::Samples,
}

/// Serves until shutdown.
pub async fn serve(parts: Parts, serving: (PathBuf, PathBuf), shutdown: CancellationToken) -> anyhow::Result<()> {
    let config = parts.config.clone();
    let tls = tls::server_config(&config, (&serving.0, &serving.1)).context("serving certificate")?;
    let reviews = parts.client.clone().filter(|_| config.webhook_authentication || config.webhook_authorization);
    let watch = parts.watch.clone();
    let endpoints =
        serving::Endpoints { configz: Some(("kubeletconfig".to_owned(), config.shown())), ..Default::default() }
            .with_check("ping", || Ok(()))
            .with_check("pleg", move || watch.unhealthy().map_or(Ok(()), Err));
    let server = Arc::new(Server {
        auth: DelegatedAuth::new(reviews, config.anonymous_auth, &["/healthz"]).remembering(config.remembered),
        endpoints,
        stats: stats::Samples::default(),
        parts,
    });
    if config.read_only_port > 0 {
        let address = (config.address.as_str(), config.read_only_port);
        let listener = TcpListener::bind(address)
            .await
            .with_context(|| format!("serving on {}:{}; set readOnlyPort", address.0, address.1))?;
        let listening = serving::Listening { tls: None, max_connections: MAX_CONNECTIONS };
        let server = server.clone();
        tokio::spawn(serving::serve(listener, listening, shutdown.clone(), move |request| {
            let server = server.clone();
            async move { server.read_only(request).await }
        }));
    }
    let address = (config.address.as_str(), config.port);
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("serving on {}:{}; set port or address", address.0, address.1))?;
    info!(address = %config.address, port = config.port, "serving");
    let listening = serving::Listening { tls: Some(Arc::new(tls)), max_connections: MAX_CONNECTIONS };
    serving::serve(listener, listening, shutdown, move |request| {
        let server = server.clone();
        async move { server.handle(request).await }
    })
    .await;
    Ok(())
}

/// The subresources of the node by which a path may be reached: any one will do. As `fineGrainedAuthz`.
fn subresources(path: &str) -> Vec<&'static str> {
    let below = |prefix: &str| path == prefix || path.strip_prefix(prefix).is_some_and(|rest| rest.starts_with('/'));
    if below("/stats") {
        vec!["stats"]
    } else if below("/metrics") {
        vec!["metrics"]
    } else if below("/checkpoint") {
        vec!["checkpoint"]
    } else if below("/logs") {
        vec!["log"]
    } else if below("/pods") || below("/runningpods") {
        vec!["pods", "proxy"]
    } else if below("/healthz") {
        vec!["healthz", "proxy"]
    } else if below("/configz") {
        vec!["configz", "proxy"]
    } else {
        vec!["proxy"]
    }
}

/// Whether `readOnlyPort` shows it, to anybody.
fn is_open(method: &Method, path: &str) -> bool {
    let first = path.trim_matches('/').split('/').next();
    matches!(first, Some("pods" | "stats" | "metrics" | "healthz")) && matches!(*method, Method::GET | Method::HEAD)
}

fn verb(method: &Method) -> &'static str {
    match *method {
        Method::POST => "create",
        Method::PUT => "update",
        Method::PATCH => "patch",
        Method::DELETE => "delete",
        _ => "get",
    }
}

/// The values of one query parameter, decoded.
pub(crate) fn query_all(query: &str, name: &str) -> Vec<String> {
    url::form_urlencoded::parse(query.as_bytes()).filter(|(k, _)| k == name).map(|(_, v)| v.into_owned()).collect()
}

pub(crate) fn query_one(query: &str, name: &str) -> Option<String> {
    query_all(query, name).into_iter().next().filter(|v| !v.is_empty())
}

/// Whether a switch is on: `1` or `true`.
pub(crate) fn query_flag(query: &str, name: &str) -> bool {
    query_one(query, name).is_some_and(|v| v == "1" || v.eq_ignore_ascii_case("true"))
}

/// Paths by which requests are counted; others are `other`.
const COUNTED: [&str; 13] = [
    "pods",
    "containerLogs",
    "exec",
    "attach",
    "portForward",
    "run",
    "checkpoint",
    "logs",
    "runningpods",
    "stats",
    "metrics",
    "healthz",
    "configz",
];

fn count(request: &Request, path: &str, server_type: &'static str) {
    let first = path.trim_matches('/').split('/').next().unwrap_or_default();
    let path = if COUNTED.contains(&first) { first } else { "other" };
    let asked = Asked {
        long_running: matches!(path, "exec" | "attach" | "portForward" | "containerLogs"),
        method: match request.method().as_str() {
            known @ ("GET" | "POST" | "PUT" | "HEAD" | "DELETE" | "PATCH" | "OPTIONS") => known.to_owned(),
            _ => "other".to_owned(),
        },
        path: path.to_owned(),
        server_type,
    };
    metrics().requests.get_or_create(&asked).inc();
}

/// What is told of a path that the configuration turns off. As `getHandlerForDisabledEndpoint`.
fn disabled(config: &KubeletConfiguration, first: &str) -> Option<&'static str> {
    let debugging =
        matches!(first, "exec" | "attach" | "portForward" | "containerLogs" | "run" | "runningpods" | "logs");
    if debugging && !config.enable_debugging_handlers {
        return Some("Debug endpoints are disabled.\n");
    }
    (first == "logs" && !config.enable_system_log_handler).then_some("logs endpoint is disabled.\n")
}

/// What a caller is told who may not (or of whom that cannot be found out).
fn refusal(code: StatusCode, user: &str, verb: &str, subresources: &[&str]) -> String {
    let what = if code == StatusCode::FORBIDDEN { "Forbidden" } else { "Authorization error" };
    format!("{what} (user={user}, verb={verb}, resource=nodes, subresource(s)=[{}])", subresources.join(" "))
}

/// Why a container waits, for who asks for its log. As `validateContainerLogStatus`.
fn shown_waiting(reason: &str) -> &str {
    match reason {
        "ErrImagePull" => "image can't be pulled",
        "ImagePullBackOff" => "trying and failing to pull image",
        other => other,
    }
}

impl Server {
    async fn handle(self: Arc<Self>, request: Request) -> Response {
        let path = request.uri().path().to_owned();
        debug!(method = %request.method(), path, "request");
        count(&request, &path, "readwrite");
        if let Err(refused) = self.admit(&request, &path).await {
            return refused;
        }
        self.answer(request, &path).await
    }

    /// Without authentication: what shows how pods and the node are doing.
    async fn read_only(self: Arc<Self>, request: Request) -> Response {
        let path = request.uri().path().to_owned();
        if !is_open(request.method(), &path) {
            return serving::text(StatusCode::NOT_FOUND, "404 page not found\n");
        }
        count(&request, &path, "readonly");
        self.answer(request, &path).await
    }

    async fn answer(&self, request: Request, path: &str) -> Response {
        match self.route(request, path).await {
            Ok(response) => response,
            // The API server passes these on to people as they are.
            Err(error) => serving::text(
                StatusCode::from_u16(error.code()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
                error.0.message.clone().unwrap_or_default(),
            ),
        }
    }

    /// Who calls, and whether it may. As `InstallAuthFilter`.
    async fn admit(&self, request: &Request, path: &str) -> Result<(), Response> {
        let peer = request.extensions().get::<serving::Peer>();
        let certificate = peer.and_then(|p| p.certificates.first()).map(|c| c.to_vec());
        let user = self.auth.authenticate(request.headers(), certificate.as_deref()).await;
        let user = user.map_err(|_| serving::text(StatusCode::UNAUTHORIZED, "Unauthorized"))?;
        if !self.parts.config.webhook_authorization {
            return Ok(());
        }
        let (verb, subresources) = (verb(request.method()), subresources(path));
        let mut code = StatusCode::FORBIDDEN;
        for subresource in &subresources {
            let access = Access::Resource {
                verb: verb.to_owned(),
                resource: "nodes".to_owned(),
                subresource: (*subresource).to_owned(),
                name: self.parts.node_name.clone(),
            };
            match self.auth.authorize(&user, &access).await {
                Ok(()) => return Ok(()),
                Err(error) if error.code() == 403 => {}
                Err(_) => code = StatusCode::INTERNAL_SERVER_ERROR,
            }
        }
        Err(serving::text(code, refusal(code, &user.name, verb, &subresources)))
    }

    async fn route(&self, request: Request, path: &str) -> Result<Response, StatusError> {
        let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
        let query = request.uri().query().unwrap_or_default().to_owned();
        if let Some(message) = disabled(&self.parts.config, parts.first().copied().unwrap_or_default()) {
            return Ok(serving::text(StatusCode::METHOD_NOT_ALLOWED, message));
        }
        match parts.as_slice() {
            ["pods"] => Ok(self.pods()),
            ["containerLogs", namespace, pod, container] => self.logs(namespace, pod, container, &query).await,
            ["exec", namespace, pod, container] | ["exec", namespace, pod, _, container] => {
                let id = self.running(namespace, pod, container).await?;
                streaming::exec(&self.parts.runtime.cri, request, &id, &query).await
            }
            ["attach", namespace, pod, container] | ["attach", namespace, pod, _, container] => {
                let id = self.running(namespace, pod, container).await?;
                let tty = {
                    let found = self.find(namespace, pod)?;
                    find_container(&found, container).is_some_and(|(_, c)| c.tty == Some(true))
                };
                streaming::attach(&self.parts.runtime.cri, request, &id, &query, tty).await
            }
            ["portForward", namespace, pod] | ["portForward", namespace, pod, _] => {
                let pod = self.find(namespace, pod)?;
                let observed = self.observe(&pod).await?;
                let sandbox = observed.latest_sandbox().filter(|s| s.ready).ok_or_else(|| {
                    StatusError::not_found(
                        "",
                        "pods",
                        &format!("sandbox of {}", pod.metadata.name.as_deref().unwrap_or("")),
                    )
                })?;
                streaming::port_forward(&self.parts.runtime.cri, request, &sandbox.id, &query).await
            }
            ["run", namespace, pod, container] | ["run", namespace, pod, _, container] => {
                let id = self.running(namespace, pod, container).await?;
                let command: Vec<String> =
                    query_one(&query, "cmd").unwrap_or_default().split_whitespace().map(str::to_owned).collect();
                let answer = self.parts.runtime.cri.exec_sync(&id, command, RUN_TIMEOUT).await;
                let answer = answer.map_err(|e| StatusError::internal(e.to_string()))?;
                Ok(serving::text(StatusCode::OK, [answer.stdout, answer.stderr].concat()))
            }
            ["checkpoint", namespace, pod, container] if request.method() == Method::POST => {
                self.checkpoint(namespace, pod, container, &query).await
            }
            ["logs", below @ ..] => logs::system(Path::new(SYSTEM_LOGS), below).await,
            ["runningpods"] => self.running_pods().await,
            ["stats", "summary"] => self.stats.summary(&self.parts, query_flag(&query, "only_cpu_and_memory")).await,
            ["metrics", "resource"] => Ok(self.stats.resource_metrics(&self.parts).await),
            ["metrics", "cadvisor"] => self.stats.cadvisor_metrics(&self.parts).await,
            ["metrics", "probes"] => {
                let mut out = stats::Exposition::new(stats::PROBES);
                out.add("prober_probe_total", crate::probes::counts());
                Ok(serving::text(StatusCode::OK, out.text))
            }
            _ => Ok(self.endpoints.answer(request.method(), path, &query)),
        }
    }

    fn pods(&self) -> Response {
        let items = self.parts.workers.means().statuses.pods();
        let body = json!({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items});
        serving::respond(StatusCode::OK, "application/json", body.to_string())
    }

    /// What the runtime runs, whoever wanted it.
    async fn running_pods(&self) -> Result<Response, StatusError> {
        let sandboxes = self.parts.runtime.cri.list_pod_sandboxes_with(Default::default()).await;
        let sandboxes = sandboxes.map_err(|e| StatusError::internal(e.to_string()))?;
        let ready = sandboxes.into_iter().filter(|s| s.state() == proto::cri::PodSandboxState::SandboxReady);
        let items: Vec<_> = ready
            .filter_map(|s| s.metadata)
            .map(|m| json!({"metadata": {"name": m.name, "namespace": m.namespace, "uid": m.uid}, "spec": {"containers": []}}))
            .collect();
        let body = json!({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items});
        Ok(serving::respond(StatusCode::OK, "application/json", body.to_string()))
    }

    /// Has the runtime write what a container is at this moment into an archive.
    async fn checkpoint(
        &self,
        namespace: &str,
        pod: &str,
        container: &str,
        query: &str,
    ) -> Result<Response, StatusError> {
        let id = self.running(namespace, pod, container).await?;
        let seconds = query_one(query, "timeout").and_then(|t| t.parse().ok()).unwrap_or(0);
        let directory = self.parts.runtime.node.root_dir.join("checkpoints");
        std::fs::create_dir_all(&directory).map_err(|e| StatusError::internal(e.to_string()))?;
        let time = apimachinery::time::rfc3339(jiff::Timestamp::now());
        let archive = directory.join(format!("checkpoint-{pod}_{namespace}-{container}-{time}.tar"));
        let made = self.parts.runtime.cri.checkpoint_container(&id, &archive, seconds).await;
        made.map_err(|error| {
            let mut failed =
                StatusError::internal(format!("checkpointing of {namespace}/{pod}/{container} failed ({error})"));
            if error.is_unimplemented() {
                failed.0.code = Some(404);
            }
            failed
        })?;
        Ok(serving::respond(StatusCode::OK, "application/json", json!({"items": [archive]}).to_string()))
    }

    /// The pod of that name that runs here.
    fn find(&self, namespace: &str, name: &str) -> Result<Arc<Pod>, StatusError> {
        let matches = |p: &Arc<Pod>| {
            p.metadata.name.as_deref() == Some(name)
                && p.metadata.namespace.as_deref().unwrap_or("default") == namespace
        };
        self.parts.workers.pods().into_iter().find(matches).ok_or_else(|| {
            let mut error = StatusError::not_found("", "pods", name);
            error.0.message = Some("pod does not exist".to_owned());
            error
        })
    }

    async fn observe(&self, pod: &Pod) -> Result<ObservedPod, StatusError> {
        self.parts.runtime.observe(uid_of(pod)).await.map_err(|e| StatusError::internal(e.to_string()))
    }

    /// The ID of a running container.
    async fn running(&self, namespace: &str, pod: &str, container: &str) -> Result<String, StatusError> {
        let found = self.find(namespace, pod)?;
        let observed = self.observe(&found).await?;
        let running = observed.latest(container).filter(|c| c.state == State::Running);
        running.map(|c| c.id.clone()).ok_or_else(|| {
            let mut error = StatusError::not_found("", "containers", container);
            error.0.message = Some(format!("container not found ({container:?})"));
            error
        })
    }

    async fn logs(&self, namespace: &str, pod: &str, container: &str, query: &str) -> Result<Response, StatusError> {
        let options = logs::Options::parse(query).map_err(|e| StatusError::bad_request(&e))?;
        let not_found = |message: String| {
            let mut error = StatusError::not_found("", "pods", pod);
            error.0.message = Some(message);
            error
        };
        let found = self.find(namespace, pod).map_err(|_| not_found(format!("pod {pod:?} does not exist")))?;
        if find_container(&found, container).is_none() {
            return Err(not_found(format!("container {container:?} not found in pod {pod:?}")));
        }
        let observed = self.observe(&found).await?;
        let mut attempts = observed.containers.iter().filter(|c| c.name == container);
        let (latest, previous) = (attempts.next(), attempts.next());
        let chosen = if options.previous {
            previous.ok_or_else(|| {
                StatusError::bad_request(format!(
                    "previous terminated container {container:?} in pod {pod:?} not found"
                ))
            })?
        } else {
            latest.filter(|c| c.state != State::Created).or(previous).ok_or_else(|| {
                let why = shown_waiting(&self.waiting_reason(&found, container)).to_owned();
                StatusError::bad_request(format!("container {container:?} in pod {pod:?} is waiting to start: {why}"))
            })?
        };
        let runtime = self.parts.runtime.clone();
        let id = chosen.id.clone();
        let follows = move || {
            let (runtime, id) = (runtime.clone(), id.clone());
            async move {
                runtime
                    .cri
                    .container_status(&id)
                    .await
                    .is_ok_and(|s| s.state() == proto::cri::ContainerState::ContainerRunning)
            }
        };
        Ok(logs::respond(PathBuf::from(&chosen.log_path), options, follows))
    }

    fn waiting_reason(&self, pod: &Pod, container: &str) -> String {
        let status = self.parts.workers.means().statuses.get(pod);
        status
            .container_statuses
            .iter()
            .chain(&status.init_container_statuses)
            .flatten()
            .find(|s| s.name == container)
            .and_then(|s| s.state.as_ref()?.waiting.as_ref()?.reason.clone())
            .unwrap_or_else(|| "ContainerCreating".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_subresources_of_the_node() {
        for (path, want) in [
            ("/exec/a/b/c", vec!["proxy"]),
            ("/containerLogs/a/b/c", vec!["proxy"]),
            ("/metrics/resource", vec!["metrics"]),
            ("/stats/summary", vec!["stats"]),
            ("/pods", vec!["pods", "proxy"]),
            ("/podsx", vec!["proxy"]),
        ] {
            assert_eq!(subresources(path), want, "{path}");
        }
    }

    #[test]
    fn what_is_read_only_shows_and_does_nothing() {
        for (method, path, open) in [
            (Method::GET, "/pods", true),
            (Method::HEAD, "/metrics/cadvisor", true),
            (Method::GET, "/stats/summary", true),
            (Method::GET, "/healthz", true),
            (Method::POST, "/pods", false),
            (Method::GET, "/configz", false),
            (Method::GET, "/containerLogs/a/b/c", false),
            (Method::POST, "/exec/a/b/c", false),
            (Method::GET, "/logs/", false),
            (Method::GET, "/", false),
        ] {
            assert_eq!(is_open(&method, path), open, "{method} {path}");
        }
    }

    #[test]
    fn refusals_have_kubernetes_words() {
        let forbidden = refusal(StatusCode::FORBIDDEN, "system:anonymous", "get", &["pods", "proxy"]);
        let want = "Forbidden (user=system:anonymous, verb=get, resource=nodes, subresource(s)=[pods proxy])";
        assert_eq!(forbidden, want);
        let unknown = refusal(StatusCode::INTERNAL_SERVER_ERROR, "u", "create", &["proxy"]);
        assert_eq!(unknown, "Authorization error (user=u, verb=create, resource=nodes, subresource(s)=[proxy])");
        assert_eq!(shown_waiting("ErrImagePull"), "image can't be pulled");
        assert_eq!(shown_waiting("ContainerCreating"), "ContainerCreating");
    }

    #[test]
    fn what_is_turned_off_is_no_method() {
        let all = KubeletConfiguration::default();
        let no_debugging = KubeletConfiguration { enable_debugging_handlers: false, ..all.clone() };
        let no_logs = KubeletConfiguration { enable_system_log_handler: false, ..all.clone() };
        for (config, path, want) in [
            (&all, "logs", None),
            (&no_debugging, "exec", Some("Debug endpoints are disabled.\n")),
            (&no_debugging, "pods", None),
            (&no_logs, "logs", Some("logs endpoint is disabled.\n")),
            (&no_logs, "containerLogs", None),
        ] {
            assert_eq!(disabled(config, path), want, "{path}");
        }
    }

    #[test]
    fn queries_are_decoded() {
        let query = "command=sh&command=-c&command=echo+a%20b&tty=1&output=true&input=0";
        assert_eq!(query_all(query, "command"), ["sh", "-c", "echo a b"]);
        assert!(query_flag(query, "tty") && query_flag(query, "output") && !query_flag(query, "input"));
    }
}
