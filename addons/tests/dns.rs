//! The DNS server as a process, asked by a real resolver over UDP and TCP.

#[allow(dead_code, reason = "shared with other tests")]
mod common;

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{FakeApi, Program, eventually, http};
use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ProtocolConfig, ResolverConfig};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::proto::rr::RecordType;
use hickory_resolver::{Resolver, TokioResolver};
use serde_json::{Value, json};

const SERVICES: &str = "/api/v1/services";
const SLICES: &str = "/apis/discovery.k8s.io/v1/endpointslices";
const NAMESPACES: &str = "/api/v1/namespaces";

fn service(name: &str, spec: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "default", "name": name}, "spec": spec})
}

fn slice(service: &str, endpoints: Value) -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"namespace": "default", "name": format!("{service}-1"), "labels": {"kubernetes.io/service-name": service}},
        "ports": [{"name": "http", "port": 80, "protocol": "TCP"}],
        "endpoints": endpoints,
    })
}

/// Nobody listens on it now.
fn free_port() -> u16 {
    let udp = std::net::UdpSocket::bind("127.0.0.1:0").expect("a port");
    udp.local_addr().expect("an address").port()
}

fn resolver(server: SocketAddr, tcp: bool) -> TokioResolver {
    let mut connection = ConnectionConfig::new(if tcp { ProtocolConfig::Tcp } else { ProtocolConfig::Udp });
    connection.port = server.port();
    let server = NameServerConfig::new(server.ip(), true, vec![connection]);
    let config = ResolverConfig::from_parts(None, vec![], vec![server]);
    let mut builder = Resolver::builder_with_config(config, TokioRuntimeProvider::default());
    builder.options_mut().cache_size = 0;
    builder.options_mut().attempts = 0;
    builder.options_mut().timeout = Duration::from_secs(4);
    builder.build().expect("a resolver")
}

async fn ask(resolver: &TokioResolver, name: &str, kind: RecordType) -> Vec<String> {
    match resolver.lookup(name, kind).await {
        Ok(found) => {
            let mut data: Vec<String> = found.answers().iter().map(|record| record.data.to_string()).collect();
            data.sort();
            data
        }
        Err(error) if error.is_nx_domain() => vec!["NXDOMAIN".into()],
        Err(error) if error.is_no_records_found() => vec!["NODATA".into()],
        Err(error) => vec![error.to_string()],
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_is_resolved_and_followed() {
    let api = FakeApi::start();
    api.apply(NAMESPACES, json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "default"}}));
    let ports = json!([{"name": "http", "port": 80, "protocol": "TCP"}]);
    api.apply(
        SERVICES,
        service("web", json!({"clusterIP": "10.96.0.20", "clusterIPs": ["10.96.0.20"], "ports": ports})),
    );
    api.apply(SERVICES, service("db", json!({"clusterIP": "None", "ports": ports})));
    api.apply(
        SLICES,
        slice("db", json!([{"addresses": ["10.1.0.1"], "hostname": "db-0"}, {"addresses": ["10.1.0.2"]}])),
    );
    let directory = tempfile::tempdir().expect("a directory");
    // Upstream is another one of us, with another cluster.
    let elsewhere = FakeApi::start();
    elsewhere.apply(NAMESPACES, json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "default"}}));
    elsewhere.apply(SERVICES, service("far", json!({"clusterIP": "10.97.0.1", "ports": ports})));
    let hosts = directory.path().join("hosts");
    std::fs::write(&hosts, "192.0.2.7 printer.test\n").expect("written");
    api.apply(
        "/api/v1/pods",
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": "default"},
            "status": {"podIPs": [{"ip": "10.1.0.9"}]}}),
    );
    let run = |api: &FakeApi, domain: &str, upstream: &str| {
        let home = directory.path().join(domain);
        std::fs::create_dir(&home).expect("a directory");
        let ports: Vec<u16> = (0..4).map(|_| free_port()).collect();
        let program = Command::new(env!("CARGO_BIN_EXE_dns"))
            .arg(format!("--kubeconfig={}", api.kubeconfig(&home).display()))
            .arg(format!("--cluster-domain={domain}"))
            .args((!upstream.is_empty()).then_some("--bind-address=127.0.0.1"))
            .arg("--resolv-conf=/nonexistent")
            .arg(format!("--port={}", ports[0]))
            .arg(format!("--health-bind-address=127.0.0.1:{}", ports[1]))
            .arg(format!("--ready-bind-address=127.0.0.1:{}", ports[2]))
            .arg(format!("--metrics-bind-address=127.0.0.1:{}", ports[3]))
            .args((!upstream.is_empty()).then(|| format!("--stub-domain=far.local={upstream}")))
            .args(["--rewrite=old.test=web.default.svc.cluster.local", "--pods=verified"])
            .arg(format!("--hosts={}", hosts.display()))
            .stderr(Stdio::inherit())
            .spawn()
            .expect("started");
        let at = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
        eventually("ready", || http(at(ports[2]), "/ready").filter(|answer| answer.contains("200 OK")));
        (Program(program), at(ports[0]), at(ports[1]), at(ports[3]))
    };
    let (_far, far_address, _, _) = run(&elsewhere, "far.local", "");
    let (_near, address, health, metrics) = run(&api, "cluster.local", &far_address.to_string());

    // Where no address is given all are answered on, of both families.
    let of_six = resolver((Ipv6Addr::LOCALHOST, far_address.port()).into(), false);
    assert_eq!(ask(&of_six, "far.default.svc.far.local.", RecordType::A).await, ["10.97.0.1"]);
    let (udp, tcp) = (resolver(address, false), resolver(address, true));
    use RecordType::{A, AAAA, PTR, SRV};
    let cases: [(&str, RecordType, &[&str]); 13] = [
        ("web.default.svc.cluster.local.", A, &["10.96.0.20"]),
        ("web.default.svc.cluster.local.", AAAA, &["NODATA"]),
        ("none.default.svc.cluster.local.", A, &["NXDOMAIN"]),
        ("db.default.svc.cluster.local.", A, &["10.1.0.1", "10.1.0.2"]),
        ("db-0.db.default.svc.cluster.local.", A, &["10.1.0.1"]),
        ("_http._tcp.web.default.svc.cluster.local.", SRV, &["0 100 80 web.default.svc.cluster.local."]),
        ("20.0.96.10.in-addr.arpa.", PTR, &["web.default.svc.cluster.local."]),
        ("10-1-0-9.default.pod.cluster.local.", A, &["10.1.0.9"]),
        ("10-1-0-8.default.pod.cluster.local.", A, &["NXDOMAIN"]),
        ("printer.test.", A, &["192.0.2.7"]),
        ("old.test.", A, &["10.96.0.20"]),
        // Asked upstream.
        ("far.default.svc.far.local.", A, &["10.97.0.1"]),
        ("none.default.svc.far.local.", A, &["NXDOMAIN"]),
    ];
    for (name, kind, want) in cases {
        assert_eq!(ask(&udp, name, kind).await, want, "{name} {kind} over UDP");
        assert_eq!(ask(&tcp, name, kind).await, want, "{name} {kind} over TCP");
    }

    // A Service that comes, an endpoint that goes, an external name into the other cluster.
    api.apply(SERVICES, service("late", json!({"clusterIP": "10.96.0.30", "ports": ports})));
    api.apply(SERVICES, service("ext", json!({"type": "ExternalName", "externalName": "far.default.svc.far.local"})));
    api.apply(SLICES, slice("db", json!([{"addresses": ["10.1.0.2"]}])));
    api.delete(SERVICES, "default", "web");
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    while ask(&udp, "web.default.svc.cluster.local.", A).await != ["NXDOMAIN"] {
        assert!(tokio::time::Instant::now() < deadline, "the deletion is not seen");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(ask(&udp, "late.default.svc.cluster.local.", A).await, ["10.96.0.30"]);
    assert_eq!(ask(&udp, "db.default.svc.cluster.local.", A).await, ["10.1.0.2"]);
    let alias = ask(&udp, "ext.default.svc.cluster.local.", A).await;
    assert!(alias.contains(&"10.97.0.1".to_owned()), "{alias:?}");

    // Many endpoints do not fit a datagram: the resolver comes back over TCP.
    let many: Vec<Value> = (0..200).map(|n| json!({"addresses": [format!("10.2.0.{n}")]})).collect();
    api.apply(SLICES, slice("db", json!(many)));
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    while ask(&tcp, "db.default.svc.cluster.local.", A).await.len() != 200 {
        assert!(tokio::time::Instant::now() < deadline, "the endpoints are not seen");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }

    assert!(http(health, "/health").is_some_and(|answer| answer.ends_with("OK")));
    let shown = http(metrics, "/metrics").expect("metrics");
    assert!(shown.contains("coredns_dns_requests_total{proto=\"udp\",type=\"A\"}"), "{shown}");
    for name in ["coredns_cache_hits_total", "coredns_cache_entries", "coredns_forward_requests_total{to="] {
        assert!(shown.contains(name), "{name}: {shown}");
    }
    let server: IpAddr = address.ip();
    assert!(server.is_loopback());
}
