//! `config`: shows and changes kubeconfig files. Files are handled as plain values, so that what this program does not know
//! of is kept.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};

use crate::cluster::kubeconfig_paths;
use crate::flags::GlobalFlags;
use crate::objects::{items, set, text};
use crate::output::{Format, table};

/// Modify kubeconfig files
#[derive(Debug, Args)]
pub(crate) struct ConfigArgs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Display merged kubeconfig settings or a specified kubeconfig file
    View {
        /// Show certificates, keys and tokens
        #[arg(long)]
        raw: bool,
        /// Only what the current context uses
        #[arg(long)]
        minify: bool,
        /// Put the contents of files in place of their names
        #[arg(long)]
        flatten: bool,
        #[arg(short = 'o', long)]
        output: Option<String>,
    },
    /// Display the current-context
    CurrentContext,
    /// Describe one or many contexts
    GetContexts {
        names: Vec<String>,
        /// name
        #[arg(short = 'o', long)]
        output: Option<String>,
        #[arg(long)]
        no_headers: bool,
    },
    /// Display clusters defined in the kubeconfig
    GetClusters,
    /// Display users defined in the kubeconfig
    GetUsers,
    /// Set the current-context in a kubeconfig file
    #[command(visible_alias = "use")]
    UseContext { name: String },
    /// Set a context entry in kubeconfig; the entry's cluster, user and namespace are the global flags
    SetContext {
        name: Option<String>,
        /// Change the current context
        #[arg(long)]
        current: bool,
    },
    /// Set a cluster entry in kubeconfig; server and authority are the global flags
    SetCluster {
        name: String,
        /// Put the contents of the authority's file into the entry
        #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false,
              action = clap::ArgAction::Set)]
        embed_certs: bool,
        #[arg(long)]
        proxy_url: Option<String>,
    },
    /// Set a user entry in kubeconfig; token and client certificate are the global flags
    SetCredentials {
        name: String,
        /// Put the contents of the certificate's files into the entry
        #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false,
              action = clap::ArgAction::Set)]
        embed_certs: bool,
        #[arg(long)]
        username: Option<String>,
        #[arg(long)]
        password: Option<String>,
    },
    /// Rename a context from the kubeconfig file
    RenameContext { from: String, to: String },
    /// Delete the specified context from the kubeconfig
    DeleteContext { name: String },
    /// Delete the specified cluster from the kubeconfig
    DeleteCluster { name: String },
    /// Delete the specified user from the kubeconfig
    DeleteUser { name: String },
    /// Set an individual value in a kubeconfig file
    Set { path: String, value: String },
    /// Unset an individual value in a kubeconfig file
    Unset { path: String },
}

/// The lists of a kubeconfig, and what each entry holds.
const LISTS: [(&str, &str); 3] = [("clusters", "cluster"), ("contexts", "context"), ("users", "user")];

pub(crate) fn run(args: ConfigArgs, flags: &GlobalFlags) -> Result<ExitCode> {
    let paths = kubeconfig_paths(flags);
    let merged = merged(&paths)?;
    match args.action {
        Action::View { raw, minify, flatten, output } => {
            let mut shown = merged;
            if minify {
                shown = minified(&shown, flags)?;
            }
            if flatten {
                embed_files(&mut shown)?;
            }
            if !raw {
                redact(&mut shown);
            }
            match Format::parse(Some(output.as_deref().unwrap_or("yaml")))? {
                Format::Name | Format::Table { .. } => bail!("allowed formats are: json, yaml, jsonpath"),
                format => print!("{}", format.render(&shown, None, false)?),
            }
        }
        Action::CurrentContext => {
            let current = flags.context.as_deref().unwrap_or_else(|| text(&merged, "/current-context"));
            if current.is_empty() {
                bail!("current-context is not set");
            }
            println!("{current}");
        }
        Action::GetContexts { names, output, no_headers } => {
            return Ok(contexts(&merged, &names, output.as_deref() == Some("name"), no_headers));
        }
        Action::GetClusters => names(&merged, "clusters"),
        Action::GetUsers => names(&merged, "users"),
        Action::UseContext { name } => {
            if find(&merged, "contexts", &name).is_none() {
                bail!("no context exists with the name: {name:?}");
            }
            let path = owner(&paths, |file| !text(file, "/current-context").is_empty())?;
            change(&path, |file| {
                file["current-context"] = json!(name);
                Ok(())
            })?;
            println!("Switched to context {name:?}.");
        }
        Action::SetContext { name, current } => {
            let name = match (name, current) {
                (Some(name), false) => name,
                (None, true) => text(&merged, "/current-context").to_owned(),
                _ => bail!("you must specify either a context name or --current"),
            };
            let fields = [("cluster", &flags.cluster), ("user", &flags.user), ("namespace", &flags.namespace)];
            let verb = put(&paths, "contexts", "context", &name, |entry| {
                for (field, value) in fields {
                    if let Some(value) = value {
                        entry.insert(field.to_owned(), json!(value));
                    }
                }
                Ok(())
            })?;
            println!("Context {name:?} {verb}.");
        }
        Action::SetCluster { name, embed_certs, proxy_url } => {
            let authority = flags.certificate_authority.as_ref();
            put(&paths, "clusters", "cluster", &name, |entry| {
                if let Some(server) = &flags.server {
                    entry.insert("server".into(), json!(server));
                }
                if flags.insecure_skip_tls_verify {
                    entry.insert("insecure-skip-tls-verify".into(), json!(true));
                }
                if let Some(server_name) = &flags.tls_server_name {
                    entry.insert("tls-server-name".into(), json!(server_name));
                }
                if let Some(proxy) = &proxy_url {
                    entry.insert("proxy-url".into(), json!(proxy));
                }
                file_field(entry, "certificate-authority", authority, embed_certs)
            })?;
            println!("Cluster {name:?} set.");
        }
        Action::SetCredentials { name, embed_certs, username, password } => {
            put(&paths, "users", "user", &name, |entry| {
                for (field, value) in [("token", &flags.token), ("username", &username), ("password", &password)] {
                    if let Some(value) = value {
                        entry.insert(field.to_owned(), json!(value));
                    }
                }
                file_field(entry, "client-certificate", flags.client_certificate.as_ref(), embed_certs)?;
                file_field(entry, "client-key", flags.client_key.as_ref(), embed_certs)
            })?;
            println!("User {name:?} set.");
        }
        Action::RenameContext { from, to } => {
            if find(&merged, "contexts", &to).is_some() {
                bail!("cannot rename the context {from:?}, the context {to:?} already exists in {}", shown(&paths));
            }
            let path = owner_of(&paths, "contexts", &from)?
                .with_context(|| format!("cannot rename the context {from:?}, it's not in {}", shown(&paths)))?;
            change(&path, |file| {
                for entry in file["contexts"].as_array_mut().into_iter().flatten() {
                    if entry["name"] == from.as_str() {
                        entry["name"] = json!(to);
                    }
                }
                if text(file, "/current-context") == from {
                    file["current-context"] = json!(to);
                }
                Ok(())
            })?;
            println!("Context {from:?} renamed to {to:?}.");
        }
        Action::DeleteContext { name } => delete(&paths, "contexts", "context", &name)?,
        Action::DeleteCluster { name } => delete(&paths, "clusters", "cluster", &name)?,
        Action::DeleteUser { name } => delete(&paths, "users", "user", &name)?,
        Action::Set { path, value } => {
            let file = owner(&paths, |_| true)?;
            change(&file, |config| set_path(config, &path, Some(json!(value))))?;
            println!("Property {path:?} set.");
        }
        Action::Unset { path } => {
            let file = owner(&paths, |_| true)?;
            change(&file, |config| set_path(config, &path, None))?;
            println!("Property {path:?} unset.");
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn shown(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(":")
}

fn empty() -> Value {
    json!({"apiVersion": "v1", "kind": "Config", "clusters": [], "contexts": [], "users": [], "current-context": "", "preferences": {}})
}

fn read(path: &Path) -> Result<Option<Value>> {
    let contents = match std::fs::read_to_string(path) {
        Ok(contents) => contents,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("{}", path.display())),
    };
    let documents = apimachinery::yaml::documents(&contents).with_context(|| format!("{}", path.display()))?;
    Ok(documents.into_iter().next())
}

/// The files as one; the first to name something wins.
fn merged(paths: &[PathBuf]) -> Result<Value> {
    let mut merged = empty();
    for path in paths {
        let Some(file) = read(path)? else { continue };
        for (list, _) in LISTS {
            for entry in items(&file, &format!("/{list}")) {
                if find(&merged, list, text(entry, "/name")).is_none()
                    && let Some(entries) = merged[list].as_array_mut()
                {
                    entries.push(entry.clone());
                }
            }
        }
        if text(&merged, "/current-context").is_empty() {
            merged["current-context"] = json!(text(&file, "/current-context"));
        }
    }
    Ok(merged)
}

fn find<'a>(config: &'a Value, list: &str, name: &str) -> Option<&'a Value> {
    items(config, &format!("/{list}")).iter().find(|entry| text(entry, "/name") == name)
}

fn names(config: &Value, list: &str) {
    println!("NAME");
    for entry in items(config, &format!("/{list}")) {
        println!("{}", text(entry, "/name"));
    }
}

fn contexts(config: &Value, wanted: &[String], only_names: bool, no_headers: bool) -> ExitCode {
    let current = text(config, "/current-context");
    let mut rows = Vec::new();
    if !no_headers && !only_names {
        rows.push(["CURRENT", "NAME", "CLUSTER", "AUTHINFO", "NAMESPACE"].map(str::to_owned).to_vec());
    }
    let mut failed = false;
    for name in wanted {
        if find(config, "contexts", name).is_none() {
            eprintln!("error: context {name} not found");
            failed = true;
        }
    }
    let mut entries: Vec<&Value> = items(config, "/contexts").iter().collect();
    entries.sort_by_key(|entry| text(entry, "/name"));
    for entry in entries {
        let name = text(entry, "/name");
        if !wanted.is_empty() && !wanted.iter().any(|wanted| wanted == name) {
            continue;
        }
        if only_names {
            println!("{name}");
            continue;
        }
        let mark = if name == current { "*" } else { "" };
        let fields =
            ["/context/cluster", "/context/user", "/context/namespace"].map(|path| text(entry, path).to_owned());
        rows.push([mark.to_owned(), name.to_owned()].into_iter().chain(fields).collect());
    }
    print!("{}", table::render(&rows));
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// Only the context in use, its cluster and its user.
fn minified(config: &Value, flags: &GlobalFlags) -> Result<Value> {
    let current = flags.context.as_deref().unwrap_or_else(|| text(config, "/current-context"));
    let Some(context) = find(config, "contexts", current) else { bail!("cannot locate context {current:?}") };
    let pick = |list: &str, name: &str| json!(find(config, list, name).into_iter().collect::<Vec<_>>());
    let mut minified = config.clone();
    minified["current-context"] = json!(current);
    minified["contexts"] = json!([context]);
    minified["clusters"] = pick("clusters", text(context, "/context/cluster"));
    minified["users"] = pick("users", text(context, "/context/user"));
    Ok(minified)
}

fn redact(config: &mut Value) {
    let hide = |entry: &mut Value, field: &str, words: &str| {
        if entry.get(field).is_some() {
            entry[field] = json!(words);
        }
    };
    for entry in config["clusters"].as_array_mut().into_iter().flatten() {
        hide(&mut entry["cluster"], "certificate-authority-data", "DATA+OMITTED");
    }
    for entry in config["users"].as_array_mut().into_iter().flatten() {
        let user = &mut entry["user"];
        hide(user, "client-certificate-data", "DATA+OMITTED");
        hide(user, "client-key-data", "DATA+OMITTED");
        hide(user, "token", "REDACTED");
        hide(user, "password", "REDACTED");
    }
}

fn embed_files(config: &mut Value) -> Result<()> {
    for (list, key, fields) in [
        ("clusters", "cluster", &["certificate-authority"][..]),
        ("users", "user", &["client-certificate", "client-key"][..]),
    ] {
        for entry in config[list].as_array_mut().into_iter().flatten() {
            let Some(entry) = entry[key].as_object_mut() else { continue };
            for field in fields {
                if let Some(Value::String(path)) = entry.remove(*field) {
                    file_field(entry, field, Some(&PathBuf::from(path)), true)?;
                }
            }
        }
    }
    Ok(())
}

/// Puts a file's path, or its contents under `FIELD-data`.
fn file_field(entry: &mut Map<String, Value>, field: &str, path: Option<&PathBuf>, embed: bool) -> Result<()> {
    let Some(path) = path else { return Ok(()) };
    if embed {
        let contents =
            std::fs::read(path).with_context(|| format!("could not read {field} data from {}", path.display()))?;
        entry.remove(field);
        entry.insert(format!("{field}-data"), json!(STANDARD.encode(contents)));
    } else {
        let absolute = std::path::absolute(path)?;
        entry.remove(&format!("{field}-data"));
        entry.insert(field.to_owned(), json!(absolute.display().to_string()));
    }
    Ok(())
}

/// The first file for which `is_owner` holds, else the last, as client-go chooses where to write.
fn owner(paths: &[PathBuf], is_owner: impl Fn(&Value) -> bool) -> Result<PathBuf> {
    for path in paths {
        if read(path)?.is_some_and(|file| is_owner(&file)) {
            return Ok(path.clone());
        }
    }
    match paths.last() {
        Some(path) => Ok(path.clone()),
        None => bail!("there is no kubeconfig file to write to"),
    }
}

fn owner_of(paths: &[PathBuf], list: &str, name: &str) -> Result<Option<PathBuf>> {
    for path in paths {
        if read(path)?.is_some_and(|file| find(&file, list, name).is_some()) {
            return Ok(Some(path.clone()));
        }
    }
    Ok(None)
}

/// Reads a file, changes it, and puts the new one in its place at once; nobody else may read it.
fn change(path: &Path, change: impl FnOnce(&mut Value) -> Result<()>) -> Result<()> {
    let mut config = read(path)?.unwrap_or_else(empty);
    change(&mut config)?;
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(directory).with_context(|| format!("{}", directory.display()))?;
    let target = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let mut temporary = target.clone().into_os_string();
    temporary.push(format!(".{}.tmp", std::process::id()));
    let written = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)
        .and_then(|mut file| {
            let yaml = apimachinery::yaml::to_string(&config).map_err(std::io::Error::other)?;
            file.write_all(yaml.as_bytes())?;
            file.sync_all()
        })
        .and_then(|()| std::fs::rename(&temporary, &target));
    if written.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    written.with_context(|| format!("{} cannot be written", path.display()))
}

/// Makes or changes an entry; says which.
fn put(
    paths: &[PathBuf],
    list: &str,
    key: &str,
    name: &str,
    fill: impl FnOnce(&mut Map<String, Value>) -> Result<()>,
) -> Result<&'static str> {
    let (path, verb) = match owner_of(paths, list, name)? {
        Some(path) => (path, "modified"),
        None => (owner(paths, |_| true)?, "created"),
    };
    change(&path, |file| {
        if !file[list].is_array() {
            file[list] = json!([]);
        }
        let Some(entries) = file[list].as_array_mut() else { return Ok(()) };
        let place = match entries.iter().position(|entry| text(entry, "/name") == name) {
            Some(place) => place,
            None => {
                entries.push(json!({"name": name, key: {}}));
                entries.len() - 1
            }
        };
        if !entries[place][key].is_object() {
            entries[place][key] = json!({});
        }
        match entries[place][key].as_object_mut() {
            Some(entry) => fill(entry),
            None => Ok(()),
        }
    })?;
    Ok(verb)
}

fn delete(paths: &[PathBuf], list: &str, word: &str, name: &str) -> Result<()> {
    let Some(path) = owner_of(paths, list, name)? else {
        bail!("cannot delete {word} {name}, not in {}", shown(paths));
    };
    change(&path, |file| {
        if word == "context" && text(file, "/current-context") == name {
            eprintln!(
                "warning: this removed your active context, use \"kubectl config use-context\" to select a different one"
            );
        }
        if let Some(entries) = file[list].as_array_mut() {
            entries.retain(|entry| text(entry, "/name") != name);
        }
        Ok(())
    })?;
    println!("deleted {word} {name} from {}", path.display());
    Ok(())
}

/// `current-context`, `contexts.NAME.namespace`, `users.NAME.token`.
fn set_path(config: &mut Value, path: &str, value: Option<Value>) -> Result<()> {
    let (first, rest) = path.split_once('.').unwrap_or((path, ""));
    let Some((list, key)) = LISTS.into_iter().find(|(list, _)| *list == first) else {
        let keys: Vec<&str> = path.split('.').collect();
        match value {
            Some(value) => set(config, &keys, value),
            None => drop(config.as_object_mut().and_then(|config| config.remove(first))),
        }
        return Ok(());
    };
    // Names may hold dots: the field is what stands behind the last.
    let (name, field) = rest.rsplit_once('.').unwrap_or((rest, ""));
    let Some(entries) = config[list].as_array_mut() else { bail!("{list} is not a list") };
    if field.is_empty() || entries.iter().any(|entry| text(entry, "/name") == rest) {
        if value.is_some() {
            bail!("a field of {list}.{rest} must be named");
        }
        entries.retain(|entry| text(entry, "/name") != rest);
        return Ok(());
    }
    if !entries.iter().any(|entry| text(entry, "/name") == name) {
        entries.push(json!({"name": name, key: {}}));
    }
    for entry in entries.iter_mut().filter(|entry| text(entry, "/name") == name) {
        match &value {
            Some(value) => set(entry, &[key, field], value.clone()),
            None => drop(entry[key].as_object_mut().and_then(|entry| entry.remove(field))),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        flags: GlobalFlags,
        #[command(flatten)]
        args: ConfigArgs,
    }

    fn config(path: &Path, line: &str) -> Result<ExitCode> {
        let path = path.display().to_string();
        let line = Line::parse_from(["config", "--kubeconfig", &path].into_iter().chain(line.split_whitespace()));
        run(line.args, &line.flags)
    }

    #[test]
    fn a_kubeconfig_is_built_step_by_step() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("config");
        for line in [
            "set-cluster c --server=https://1.2.3.4:6443",
            "set-credentials u --token=secret",
            "set-context x --cluster=c --user=u --namespace=ns",
            "use-context x",
            "rename-context x y",
        ] {
            config(&path, line).expect(line);
        }
        let written = read(&path).expect("readable").expect("there");
        assert_eq!(written["clusters"], json!([{"name": "c", "cluster": {"server": "https://1.2.3.4:6443"}}]));
        assert_eq!(
            written["contexts"],
            json!([{"name": "y", "context": {"cluster": "c", "user": "u", "namespace": "ns"}}])
        );
        assert_eq!(written["current-context"], "y");
        assert_eq!(path.metadata().expect("metadata").permissions().mode() & 0o777, 0o600);
        assert!(config(&path, "use-context nonsense").is_err());
        config(&path, "set contexts.y.namespace other").expect("set");
        config(&path, "delete-user u").expect("deleted");
        let written = read(&path).expect("readable").expect("there");
        assert_eq!(written["contexts"][0]["context"]["namespace"], "other");
        assert_eq!(written["users"], json!([]));
    }

    #[test]
    fn secrets_are_not_shown() {
        let mut config =
            json!({"clusters": [], "users": [{"name": "u", "user": {"token": "t", "client-key-data": "k"}}]});
        redact(&mut config);
        assert_eq!(config["users"][0]["user"], json!({"token": "REDACTED", "client-key-data": "DATA+OMITTED"}));
    }
}
