//! Words that name objects: `pods`, `pods a b`, `pods,services`, `pod/a svc/b`, `all`.

use anyhow::{Result, bail};

use crate::cluster::{Cluster, Resource};

/// Objects of one resource in one namespace: those named, or all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) resource: Resource,
    pub(crate) namespace: String,
    pub(crate) names: Vec<String>,
}

/// What the words say, before anybody was asked what they mean.
#[derive(Debug, PartialEq, Eq)]
enum Words<'a> {
    /// Resource words, and the names that follow them.
    Types(Vec<&'a str>, Vec<&'a str>),
    /// Resource word and name, pair by pair.
    Pairs(Vec<(&'a str, &'a str)>),
}

fn split(words: &[String]) -> Result<Words<'_>> {
    let Some((first, names)) = words.split_first() else {
        bail!(
            "You must specify the type of resource to get. Use \"kubectl api-resources\" for a complete list of supported resources.\n\n\
             error: Required resource not specified."
        );
    };
    if words.iter().any(|word| word.contains('/')) {
        let mut pairs = Vec::new();
        for word in words {
            match word.split_once('/') {
                Some((resource, name)) if !resource.is_empty() && !name.is_empty() && !name.contains('/') => {
                    pairs.push((resource, name));
                }
                Some(_) => bail!("arguments in resource/name form may not have more than one slash"),
                None => bail!(
                    "there is no need to specify a resource type as a separate argument when passing arguments in resource/name form (e.g. 'kubectl get resource/<resource_name>' instead of 'kubectl get resource resource/<resource_name>'"
                ),
            }
        }
        return Ok(Words::Pairs(pairs));
    }
    let types: Vec<&str> = first.split(',').filter(|word| !word.is_empty()).collect();
    if types.is_empty() {
        bail!("arguments must consist of a resource type");
    }
    Ok(Words::Types(types, names.iter().map(String::as_str).collect()))
}

/// The objects that the words name. Neighbouring pairs of one resource become one target.
pub(crate) async fn targets(cluster: &Cluster, words: &[String]) -> Result<Vec<Target>> {
    let mut targets: Vec<Target> = Vec::new();
    match split(words)? {
        Words::Types(types, names) => {
            let discovery = cluster.discovery().await?;
            let names: Vec<String> = names.into_iter().map(str::to_owned).collect();
            for word in types {
                let category = discovery.category(word);
                let resources = if category.is_empty() { vec![discovery.resolve(word)?] } else { category };
                for resource in resources {
                    targets.push(Target { resource, namespace: cluster.namespace.clone(), names: names.clone() });
                }
            }
        }
        Words::Pairs(pairs) => {
            for (word, name) in pairs {
                let resource = cluster.resource(word).await?;
                match targets.last_mut().filter(|last| last.resource == resource) {
                    Some(last) => last.names.push(name.to_owned()),
                    None => targets.push(Target {
                        resource,
                        namespace: cluster.namespace.clone(),
                        names: vec![name.to_owned()],
                    }),
                }
            }
        }
    }
    Ok(targets)
}

/// The one object that a command works on: `deployment/x`, `deployment x`, or a bare name of `default_type`.
pub(crate) async fn one_object(
    cluster: &Cluster,
    words: &[String],
    default_type: Option<&str>,
) -> Result<(Resource, String)> {
    let with_type: Vec<String> = match (words, default_type) {
        ([name], Some(default)) if !name.contains('/') => vec![default.to_owned(), name.clone()],
        _ => words.to_vec(),
    };
    let mut found = targets(cluster, &with_type).await?;
    match (found.pop(), found.is_empty()) {
        (Some(Target { resource, mut names, .. }), true) if names.len() == 1 => Ok((resource, names.swap_remove(0))),
        (Some(target), true) if target.names.is_empty() => {
            bail!("resource(s) were provided, but no name was specified")
        }
        _ => bail!("exactly one object must be named, as TYPE/NAME or TYPE NAME"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_split_into_types_and_names() {
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        let list = words(&["pods"]);
        assert_eq!(split(&list).expect("one"), Words::Types(vec!["pods"], vec![]));
        let list = words(&["po,svc", "a", "b"]);
        assert_eq!(split(&list).expect("many"), Words::Types(vec!["po", "svc"], vec!["a", "b"]));
        let list = words(&["po/a", "svc/b"]);
        assert_eq!(split(&list).expect("pairs"), Words::Pairs(vec![("po", "a"), ("svc", "b")]));
        for (wrong, message) in [
            (words(&[]), "You must specify the type of resource to get"),
            (words(&["pods", "pod/a"]), "there is no need to specify a resource type"),
            (words(&["pod/a/b"]), "more than one slash"),
            (words(&["pod/"]), "more than one slash"),
            (words(&[","]), "must consist of a resource type"),
        ] {
            let error = split(&wrong).expect_err("wrong").to_string();
            assert!(error.contains(message), "{error}");
        }
    }
}
