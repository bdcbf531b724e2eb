//! `/healthz`, `/livez`, `/readyz` with named checks, and `/version`.

use crate::server::Context;
use crate::server::body::Body;
use crate::server::request_info::Query;
use crate::server::respond;
use http::Response;
use serde_json::json;
use std::fmt::Write as _;

/// The answer at a health path; None if it is none.
pub fn document(context: &Context, path: &str, query: &Query) -> Option<Response<Body>> {
    let path = path.trim_matches('/');
    // A check's name may hold slashes itself.
    let (endpoint, single) = path.split_once('/').map_or((path, None), |(endpoint, name)| (endpoint, Some(name)));
    if !matches!(endpoint, "healthz" | "livez" | "readyz") {
        return None;
    }
    let excluded: Vec<&str> = query.all("exclude").collect();
    let checks: Vec<(&str, Result<(), &'static str>)> = checks(context, endpoint)
        .into_iter()
        .filter(|(name, _)| single.is_none_or(|wanted| wanted == *name) && !excluded.contains(name))
        .collect();
    if checks.is_empty() && single.is_some() {
        return Some(respond::text(404, "404 page not found\n"));
    }
    let failed = checks.iter().any(|(_, result)| result.is_err());
    let mut text = String::new();
    for (name, result) in &checks {
        // Writing to a string does not fail.
        let _ = match result {
            Ok(()) => writeln!(text, "[+]{name} ok"),
            Err(_) => writeln!(text, "[-]{name} failed: reason withheld"),
        };
    }
    Some(match (failed, query.has("verbose")) {
        (true, _) => respond::text(500, format!("{text}{endpoint} check failed\n")),
        (false, true) => respond::text(200, format!("{text}{endpoint} check passed\n")),
        (false, false) => respond::text(200, "ok"),
    })
}

fn checks(context: &Context, endpoint: &str) -> Vec<(&'static str, Result<(), &'static str>)> {
    let state = &context.state;
    let says = |ok: bool, why: &'static str| if ok { Ok(()) } else { Err(why) };
    let loaded = context.store.progress() > 0;
    let mut checks = vec![
        ("ping", Ok(())),
        ("log", Ok(())),
        ("etcd", says(state.etcd_answers(), "etcd does not answer")),
        ("poststarthook/bootstrap-controller", says(state.is_bootstrapped(), "not finished")),
        ("poststarthook/rbac/bootstrap-roles", says(state.is_bootstrapped(), "not finished")),
    ];
    if endpoint == "readyz" {
        checks.push(("etcd-readiness", says(state.etcd_answers(), "etcd does not answer")));
        checks.push(("informer-sync", says(loaded, "the caches are not filled")));
        checks.push(("shutdown", says(!state.is_stopping(), "process is shutting down")));
    }
    if endpoint == "livez" {
        // Restarting this process mends none of these.
        checks.retain(|(name, _)| *name != "etcd");
    }
    checks
}

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
        "gitCommit": "",
        "gitTreeState": "clean",
        "buildDate": "1970-01-01T00:00:00Z",
        "goVersion": "none",
        "compiler": "rustc",
        "platform": format!("linux/{}", if cfg!(target_arch = "x86_64") { "amd64" } else { std::env::consts::ARCH }),
    });
    respond::plain(200, "application/json", Body::from(body.to_string()))
}
