//! The phases that speak with a running API server as its administrator: the cluster's own objects, marking the control
//! plane, bootstrap tokens and the line with which other machines join.

use anyhow::{Context, Result, bail};
use clap::Subcommand;
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use super::cluster::Cluster;
use super::components::NodeFlags;
use super::kubeconfig::{self, Credentials};
use super::layout::{ClusterFlags, Layout};
use super::pki::{self, Signer};
use super::token::{self, Stored, Token};
use super::{config, discovery, objects, x509};

const SECRETS: &str = "/api/v1/namespaces/kube-system/secrets";

/// `ctl bootstrap token`.
#[derive(Debug, Subcommand)]
pub(crate) enum TokenCommand {
    /// Make a token with which machines can join
    Create {
        /// The token (default: a random one)
        token: Option<String>,
        /// How long it is good for; 0 for ever
        #[arg(long, value_name = "DURATION", default_value = "24h0m0s")]
        ttl: String,
        /// What it is for
        #[arg(long)]
        description: Option<String>,
        /// The groups that its bearer belongs to
        #[arg(long, value_delimiter = ',', default_value = token::NODE_GROUP)]
        groups: Vec<String>,
        /// Print the line with which a machine joins
        #[arg(long)]
        print_join_command: bool,
    },
    /// List the tokens
    List,
    /// Take tokens back, by ID or whole
    Delete {
        #[arg(required = true)]
        tokens: Vec<String>,
    },
    /// Print a random token without making it known to the cluster
    Generate,
}

/// Applies what makes the cluster one that others can join.
pub(crate) async fn apply_objects(layout: &Layout, flags: &ClusterFlags, node: &NodeFlags) -> Result<usize> {
    let super_admin = Cluster::from_file(&layout.kubeconfig("super-admin")).await?;
    super_admin
        .apply(&objects::admin_binding())
        .await
        .context("cannot make kubeadm:cluster-admins an administrator")?;

    let kubelet_config = apimachinery::yaml::to_string(&config::kubelet(layout, flags, node)?)?;
    let kube_proxy_config = apimachinery::yaml::to_string(&config::kube_proxy(layout, flags))?;
    let ca_certificate = pki::authority_certificate(layout, Signer::Cluster)?;
    let cluster_info = kubeconfig::render(&flags.server_url()?, &ca_certificate, "", &Credentials::Anonymous);
    let objects = objects::all(layout, flags, &kubelet_config, &kube_proxy_config, &cluster_info)?;
    for object in &objects {
        super_admin.apply(object).await.with_context(|| {
            format!("cannot apply {} {}", object["kind"].as_str().unwrap_or_default(), object["metadata"]["name"])
        })?;
    }
    Ok(objects.len() + 1)
}

/// Labels this node as one of the control plane, and taints it if asked.
pub(crate) async fn mark_control_plane(layout: &Layout, flags: &ClusterFlags, taint: bool) -> Result<()> {
    let admin = Cluster::from_file(&layout.kubeconfig("admin")).await?;
    let path = format!("/api/v1/nodes/{}", flags.node_name()?);
    admin.merge(&path, &objects::control_plane_mark(taint)).await.map(drop)
}

/// Runs one of the token commands.
pub(crate) async fn tokens(command: TokenCommand, layout: &Layout, now: Timestamp) -> Result<()> {
    match command {
        TokenCommand::Generate => println!("{}", Token::generate()?),
        TokenCommand::List => {
            let admin = Cluster::from_file(&layout.kubeconfig("admin")).await?;
            print!("{}", token::table(&list(&admin).await?, now));
        }
        TokenCommand::Delete { tokens } => {
            let admin = Cluster::from_file(&layout.kubeconfig("admin")).await?;
            for token in tokens {
                let id = token.split('.').next().unwrap_or_default();
                if !token::is_id(id) {
                    bail!("{token:?} is neither a token nor its ID");
                }
                if !admin.delete(&format!("{SECRETS}/{}", token::secret_name(id))).await? {
                    bail!("no token has the ID {id:?}");
                }
                println!("bootstrap token {id:?} deleted");
            }
            sign_cluster_info(&admin, now).await?;
        }
        TokenCommand::Create { token, ttl, description, groups, print_join_command } => {
            let admin = Cluster::from_file(&layout.kubeconfig("admin")).await?;
            let token = match token {
                Some(text) => text.parse()?,
                None => Token::generate()?,
            };
            if let Some(bad) = groups.iter().find(|group| !group.starts_with("system:bootstrappers:")) {
                bail!("the group {bad:?} does not begin with system:bootstrappers:");
            }
            let secret = token::secret(&token, description.as_deref(), expiry(&ttl, now)?, &groups);
            admin.post(SECRETS, &secret).await.with_context(|| format!("cannot make the token {:?}", token.id))?;
            sign_cluster_info(&admin, now).await?;
            match print_join_command {
                true => println!("{}", join_command(layout, &admin, &token)?),
                false => println!("{token}"),
            }
        }
    }
    Ok(())
}

/// When a token made now with this `--ttl` ends.
fn expiry(ttl: &str, now: Timestamp) -> Result<Option<Timestamp>> {
    let ttl = apimachinery::time::parse_duration(ttl).map_err(|error| anyhow::anyhow!("--ttl {ttl:?}: {error}"))?;
    let ttl = SignedDuration::try_from(ttl).context("--ttl is too long")?;
    if ttl.is_zero() {
        return Ok(None);
    }
    if ttl.is_negative() {
        bail!("--ttl must not be negative");
    }
    Ok(Some(now.checked_add(ttl).context("--ttl is too long")?))
}

/// The line with which another machine joins.
fn join_command(layout: &Layout, admin: &Cluster, token: &Token) -> Result<String> {
    let pin = x509::inspect(&pki::authority_certificate(layout, Signer::Cluster)?)?.public_key_pin;
    let address = admin.server().trim_start_matches("https://");
    Ok(format!("./bootstrap join {address} --token {token} --ca-cert-hash {pin}"))
}

async fn list(admin: &Cluster) -> Result<Vec<Stored>> {
    let path = format!("{SECRETS}?fieldSelector=type%3D{}", token::SECRET_TYPE.replace('/', "%2F"));
    let secrets = admin.get(&path).await?.unwrap_or_default();
    Ok(secrets["items"].as_array().into_iter().flatten().filter_map(token::stored).collect())
}

/// Signs `cluster-info` with every token that is good for it, and takes away the signatures of others. The controller
/// `bootstrapsigner` does the same; a token can be used at once when it is done here too.
async fn sign_cluster_info(admin: &Cluster, now: Timestamp) -> Result<()> {
    let info = admin
        .get(discovery::CLUSTER_INFO)
        .await?
        .context("the cluster has no cluster-info; run `bootstrap init` again")?;
    let patch = signature_patch(&info, &list(admin).await?, now);
    if patch["data"].as_object().is_some_and(|data| !data.is_empty()) {
        admin.merge(discovery::CLUSTER_INFO, &patch).await.context("cannot sign cluster-info")?;
    }
    Ok(())
}

/// The merge patch that makes the signatures in `info` those of `tokens`.
fn signature_patch(info: &Value, tokens: &[Stored], now: Timestamp) -> Value {
    let content = info["data"]["kubeconfig"].as_str().unwrap_or_default();
    let mut data = serde_json::Map::new();
    let wanted: Vec<(String, String)> = tokens
        .iter()
        .filter(|stored| stored.signs(now))
        .map(|stored| (token::signature_key(&stored.token.id), token::sign(content, &stored.token)))
        .collect();
    for (key, signature) in &wanted {
        if info["data"][key] != *signature {
            data.insert(key.clone(), json!(signature));
        }
    }
    for key in info["data"].as_object().into_iter().flatten().map(|(key, _)| key) {
        if key.starts_with("jws-kubeconfig-") && !wanted.iter().any(|(name, _)| name == key) {
            data.insert(key.clone(), Value::Null);
        }
    }
    json!({"data": data})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures_follow_the_tokens() -> Result<()> {
        let now: Timestamp = "2026-11-21T04:00:00Z".parse()?;
        let stored = |text: &str, expires: Option<Timestamp>| -> Result<Stored> {
            let secret = token::secret(&text.parse()?, None, expires, &[]);
            token::stored(&secret).context("a token")
        };
        let good = stored("aaaaaa.0123456789abcdef", None)?;
        let old = stored("bbbbbb.0123456789abcdef", Some(now))?;
        let info = json!({"data": {"kubeconfig": "x", "jws-kubeconfig-bbbbbb": "s", "jws-kubeconfig-cccccc": "t"}});
        let patch = signature_patch(&info, &[good.clone(), old.clone()], now);
        let signature = token::sign("x", &good.token);
        assert_eq!(
            patch,
            json!({"data": {"jws-kubeconfig-aaaaaa": signature, "jws-kubeconfig-bbbbbb": null, "jws-kubeconfig-cccccc": null}})
        );
        let signed = json!({"data": {"kubeconfig": "x", "jws-kubeconfig-aaaaaa": signature}});
        assert_eq!(signature_patch(&signed, &[good, old], now), json!({"data": {}}));
        Ok(())
    }

    #[test]
    fn a_ttl_of_zero_is_for_ever() -> Result<()> {
        let now: Timestamp = "2026-11-21T04:00:00Z".parse()?;
        assert_eq!(expiry("0", now)?, None);
        assert_eq!(expiry("24h0m0s", now)?, Some("2026-11-22T04:00:00Z".parse()?));
        assert!(expiry("-1h", now).is_err());
        assert!(expiry("soon", now).is_err());
        Ok(())
    }
}
