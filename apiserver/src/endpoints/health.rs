//! `/healthz`, `/livez`, `/readyz` with named checks, `/version` and `/configz`.

use crate::server::body::Body;
use crate::server::request_info::Query;
use crate::server::{Context, respond};
use http::Response;
use http::header::{HeaderName, HeaderValue};
use serde_json::{Map, Value, json};
use std::fmt::Write as _;

const NO_SNIFF: HeaderName = HeaderName::from_static("x-content-type-options");

/// What must be so for a check to pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Needs {
    Nothing,
    /// etcd answers.
    Etcd,
    /// The watch caches have been filled.
    Caches,
    /// What the server itself puts into the store is there.
    Bootstrap,
    /// The server is not told to stop.
    Running,
}

/// The checks by their names in kube-apiserver, and whether only `/readyz` has them. Hooks of parts that are one here pass
/// together.
const CHECKS: [(&str, Needs, bool); 15] = [
    ("ping", Needs::Nothing, false),
    ("log", Needs::Nothing, false),
    ("etcd", Needs::Etcd, false),
    ("etcd-readiness", Needs::Etcd, true),
    ("informer-sync", Needs::Caches, true),
    ("poststarthook/start-apiserver-admission-initializer", Needs::Nothing, false),
    ("poststarthook/generic-apiserver-start-informers", Needs::Caches, false),
    ("poststarthook/start-system-namespaces-controller", Needs::Bootstrap, false),
    ("poststarthook/start-cluster-authentication-info-controller", Needs::Bootstrap, false),
    ("poststarthook/start-service-ip-repair-controllers", Needs::Bootstrap, false),
    ("poststarthook/rbac/bootstrap-roles", Needs::Bootstrap, false),
    ("poststarthook/scheduling/bootstrap-system-priority-classes", Needs::Bootstrap, false),
    ("poststarthook/bootstrap-controller", Needs::Bootstrap, false),
    ("poststarthook/start-kubernetes-service-cidr-controller", Needs::Bootstrap, false),
    ("shutdown", Needs::Running, true),
];

/// The answer at a health path; None if it is none.
pub fn document(context: &Context, path: &str, query: &Query) -> Option<Response<Body>> {
    let (endpoint, single) = split(path)?;
    let state = &context.state;
    let check = |needs| match needs {
        Needs::Nothing => Ok(()),
        Needs::Etcd if !state.etcd_answers() => Err("etcd does not answer"),
        Needs::Caches if context.store.progress() == 0 => Err("the caches are not filled"),
        Needs::Bootstrap if !state.is_bootstrapped() => Err("not finished"),
        Needs::Running if state.is_stopping() => Err("process is shutting down"),
        _ => Ok(()),
    };
    let excluded: Vec<&str> = query.all("exclude").collect();
    let (code, text) = answer(endpoint, single, &excluded, query.has("verbose"), check);
    for (name, needs, _) in CHECKS {
        component_base::metrics::checked(name, endpoint, check(needs).is_ok());
    }
    let mut response = respond::text(code, text);
    response.headers_mut().insert(NO_SNIFF, HeaderValue::from_static("nosniff"));
    Some(response)
}

/// The endpoint, and the one check of it that is asked, if so. A check's name may hold slashes itself.
fn split(path: &str) -> Option<(&'static str, Option<&str>)> {
    let path = path.trim_matches('/');
    let (endpoint, single) = path.split_once('/').map_or((path, None), |(endpoint, name)| (endpoint, Some(name)));
    let endpoint = ["healthz", "livez", "readyz"].into_iter().find(|known| *known == endpoint)?;
    Some((endpoint, single))
}

/// Code and text, in kube-apiserver's words. As `handleRootHealth`.
fn answer(
    endpoint: &str,
    single: Option<&str>,
    excluded: &[&str],
    verbose: bool,
    check: impl Fn(Needs) -> Result<(), &'static str>,
) -> (u16, String) {
    let checks = || CHECKS.into_iter().filter(|(_, _, of_readyz)| endpoint == "readyz" || !of_readyz);
    if let Some(wanted) = single {
        return match checks().find(|(name, ..)| *name == wanted).map(|(_, needs, _)| check(needs)) {
            Some(Ok(())) => (200, "ok".to_owned()),
            Some(Err(why)) => (500, format!("internal server error: {why}\n")),
            None => (404, "404 page not found\n".to_owned()),
        };
    }
    let (mut text, mut failed) = (String::new(), false);
    for (name, needs, _) in checks() {
        // Writing to a string does not fail.
        let _ = match check(needs) {
            _ if excluded.contains(&name) => writeln!(text, "[+]{name} excluded: ok"),
            Ok(()) => writeln!(text, "[+]{name} ok"),
            Err(_) => {
                failed = true;
                writeln!(text, "[-]{name} failed: reason withheld")
            }
        };
    }
    let unknown: Vec<String> = excluded
        .iter()
        .filter(|name| !checks().any(|(known, ..)| known == **name))
        .map(|name| format!("{name:?}"))
        .collect();
    if !unknown.is_empty() {
        let _ = writeln!(text, "warn: some health checks cannot be excluded: no matches for {}", unknown.join(","));
    }
    match (failed, verbose) {
        (true, _) => (500, format!("{text}{endpoint} check failed\n")),
        (false, true) => (200, format!("{text}{endpoint} check passed\n")),
        (false, false) => (200, "ok".to_owned()),
    }
}

/// What was built, if the build was told.
pub const GIT_COMMIT: &str = match option_env!("GIT_COMMIT") {
    Some(commit) => commit,
    None => "unknown",
};

/// `/version`.
pub fn version() -> Response<Body> {
    let body = json!({
        "major": "1",
        "minor": "36",
        "emulationMajor": "1",
        "emulationMinor": "36",
        "minCompatibilityMajor": "1",
        "minCompatibilityMinor": "35",
        "gitVersion": crate::KUBERNETES_VERSION,
        "gitCommit": GIT_COMMIT,
        "gitTreeState": "clean",
        "buildDate": "1970-01-01T00:00:00Z",
        "goVersion": "none",
        "compiler": "rustc",
        "platform": platform(),
    });
    respond::plain(200, "application/json", Body::from(body.to_string()))
}

/// `linux/amd64`, as Go names it.
pub fn platform() -> String {
    let arch = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    format!("linux/{arch}")
}

/// `/configz`: the flags that the server was started with.
pub fn configuration() -> Response<Body> {
    let flags: Map<String, Value> = std::env::args()
        .skip(1)
        .filter_map(|flag| {
            let flag = flag.trim_start_matches('-');
            let (name, value) = flag.split_once('=').unwrap_or((flag, "true"));
            (!name.is_empty()).then(|| (name.to_owned(), value.into()))
        })
        .collect();
    respond::plain(200, "application/json", Body::from(json!({"apiserver": {"flags": flags}}).to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checks_are_named_excluded_and_told() {
        let well = |_| Ok(());
        let no_etcd = |needs| if needs == Needs::Etcd { Err("etcd does not answer") } else { Ok(()) };
        assert_eq!(answer("livez", None, &[], false, well), (200, "ok".to_owned()));
        let (code, text) = answer("readyz", None, &["etcd", "none"], true, no_etcd);
        assert_eq!(code, 500);
        for line in [
            "[+]ping ok\n",
            "[+]etcd excluded: ok\n",
            "[-]etcd-readiness failed: reason withheld\n",
            "warn: some health checks cannot be excluded: no matches for \"none\"\n",
            "readyz check failed\n",
        ] {
            assert!(text.contains(line), "{text}");
        }
        let (code, text) = answer("healthz", None, &[], true, well);
        assert!(code == 200 && text.ends_with("healthz check passed\n") && !text.contains("etcd-readiness"), "{text}");
        assert_eq!(answer("healthz", Some("etcd"), &[], false, no_etcd).0, 500);
        assert_eq!(answer("livez", Some("poststarthook/rbac/bootstrap-roles"), &[], false, well).0, 200);
        assert_eq!(answer("livez", Some("shutdown"), &[], false, well).0, 404);
        assert_eq!(
            split("/readyz/poststarthook/rbac/bootstrap-roles").unwrap().1,
            Some("poststarthook/rbac/bootstrap-roles")
        );
        assert!(split("/healthy").is_none());
    }
}
