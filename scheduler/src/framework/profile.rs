//! A profile: the plugins that place the pods of one `schedulerName`, in order, with their weights.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use super::{Permit, Plugin, Points, State, Timings};
use crate::cache::{NodeId, PendingPod, Snapshot};
use crate::config::{PluginSet, ProfileConfig};
use crate::plugins;

/// A configuration that cannot be carried out.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ProfileError {
    /// The configuration enables a plugin that there is not.
    #[error("profile {profile:?}: plugin {plugin:?} does not exist")]
    UnknownPlugin { profile: String, plugin: String },
    /// The configuration enables a plugin at a point that it does not implement.
    #[error("profile {profile:?}: plugin {plugin:?} does not extend the {point} point")]
    WrongPoint { profile: String, plugin: String, point: &'static str },
    /// A point at which exactly one, or at least one, plugin must be.
    #[error("profile {profile:?}: {what}")]
    Incomplete { profile: String, what: &'static str },
    /// A plugin's arguments do not hold.
    #[error("profile {profile:?}: pluginConfig of {plugin:?}: {cause}")]
    Arguments { profile: String, plugin: String, cause: String },
}

/// The plugins of a profile and where each of them speaks, as places in `plugins`.
pub struct Profile {
    pub scheduler_name: String,
    /// How many percent of the nodes are looked at before scoring; `None`: by the size of the cluster.
    pub percentage_of_nodes_to_score: Option<u32>,
    pub plugins: Vec<Arc<dyn Plugin>>,
    pub pre_enqueue: Vec<u8>,
    pub queue_sort: u8,
    pub pre_filter: Vec<u8>,
    pub filter: Vec<u8>,
    pub post_filter: Vec<u8>,
    pub pre_score: Vec<u8>,
    /// With weights.
    pub score: Vec<(u8, i64)>,
    pub reserve: Vec<u8>,
    pub permit: Vec<u8>,
    pub pre_bind: Vec<u8>,
    pub bind: Vec<u8>,
    pub post_bind: Vec<u8>,
}

impl fmt::Debug for Profile {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.plugins.iter().map(|plugin| plugin.name()).collect();
        formatter
            .debug_struct("Profile")
            .field("scheduler_name", &self.scheduler_name)
            .field("plugins", &names)
            .finish()
    }
}

/// A plugin chosen for a profile; the weight is 0 unless the configuration gives one.
struct Chosen {
    plugin: Arc<dyn Plugin>,
    weight: i64,
    /// The points at which the configuration disables it.
    disabled: Points,
}

impl Profile {
    /// Builds the profile that `config` describes: the defaults, less what it disables, plus what it enables.
    pub fn build(config: &ProfileConfig, percentage_of_nodes_to_score: Option<u32>) -> Result<Profile, ProfileError> {
        let name = &config.scheduler_name;
        let mut chosen: Vec<Chosen> = Vec::new();
        let multi = config.plugins.multi_point.clone().unwrap_or_default();
        for (plugin, weight) in plugins::DEFAULTS {
            let disabled = multi.disables(plugin) && !multi.enabled.iter().any(|enabled| enabled.name == *plugin);
            if !disabled {
                chosen.push(Chosen { plugin: make(config, plugin)?, weight: *weight, disabled: Points(0) });
            }
        }
        for enabled in &multi.enabled {
            match chosen.iter_mut().find(|chosen| chosen.plugin.name() == enabled.name) {
                Some(chosen) => chosen.weight = enabled.weight.unwrap_or(chosen.weight),
                None => chosen.push(Chosen {
                    plugin: make(config, &enabled.name)?,
                    weight: enabled.weight.unwrap_or(1),
                    disabled: Points(0),
                }),
            }
        }
        for (point_name, point, set) in config.plugins.points() {
            for plugin in &mut chosen {
                if set.disables(plugin.plugin.name()) {
                    plugin.disabled = plugin.disabled.and(point);
                }
            }
            enable_at(config, &mut chosen, point_name, point, set)?;
        }
        let profile = Profile::arrange(name, percentage_of_nodes_to_score, chosen);
        profile.ok_or_else(|| ProfileError::Incomplete {
            profile: name.clone(),
            what: "one queueSort plugin and at least one bind plugin are required",
        })
    }

    /// The profile of a scheduler that is not configured.
    pub fn default_profile() -> Result<Profile, ProfileError> {
        Profile::build(&ProfileConfig::default(), None)
    }

    fn arrange(name: &str, percentage: Option<u32>, chosen: Vec<Chosen>) -> Option<Profile> {
        let at = |point: Points| -> Vec<u8> {
            let speaks = |chosen: &Chosen| chosen.plugin.points().contains(point) && !chosen.disabled.contains(point);
            chosen.iter().enumerate().filter(|(_, chosen)| speaks(chosen)).map(|(index, _)| index as u8).collect()
        };
        let score =
            at(Points::SCORE).into_iter().map(|index| (index, chosen[usize::from(index)].weight.max(1))).collect();
        let bind = at(Points::BIND);
        let queue_sort = *at(Points::QUEUE_SORT).first()?;
        if bind.is_empty() {
            return None;
        }
        Some(Profile {
            scheduler_name: name.to_owned(),
            percentage_of_nodes_to_score: percentage,
            pre_enqueue: at(Points::PRE_ENQUEUE),
            queue_sort,
            pre_filter: at(Points::PRE_FILTER),
            filter: at(Points::FILTER),
            post_filter: at(Points::POST_FILTER),
            pre_score: at(Points::PRE_SCORE),
            score,
            reserve: at(Points::RESERVE),
            permit: at(Points::PERMIT),
            pre_bind: at(Points::PRE_BIND),
            bind,
            post_bind: at(Points::POST_BIND),
            plugins: chosen.into_iter().map(|chosen| chosen.plugin).collect(),
        })
    }

    /// Takes what Reserve plugins hold for the pod, and asks Permit; on a refusal everything is given back.
    /// What was reserved is for PreBind; the error is the plugin's place and its words.
    pub fn reserve(
        &self,
        pod: &PendingPod,
        snapshot: &mut Snapshot,
        node: NodeId,
        timings: &mut Timings,
    ) -> Result<Vec<(u8, State)>, (u8, String)> {
        let status = |fits: bool| if fits { "Success" } else { "Unschedulable" };
        let began = Instant::now();
        let mut reserved = Vec::new();
        let mut outcome = Ok(());
        for place in &self.reserve {
            match self.plugin(*place).reserve(pod, snapshot, node) {
                Ok(state) => reserved.push((*place, state)),
                Err(words) => {
                    outcome = Err((*place, words));
                    break;
                }
            }
        }
        let began = timings.note("Reserve", status(outcome.is_ok()), began);
        let name = snapshot.nodes.name[node.index()].clone();
        let permitted = outcome.and_then(|()| {
            let permitted = self.permit.iter().try_for_each(|place| match self.plugin(*place).permit(pod, &name) {
                Permit::Allow => Ok(()),
                Permit::Reject(words) => Err((*place, words)),
            });
            timings.note("Permit", status(permitted.is_ok()), began);
            permitted
        });
        match permitted {
            Ok(()) => Ok(reserved),
            Err(refusal) => {
                self.unreserve(pod, snapshot);
                Err(refusal)
            }
        }
    }

    /// Gives back what [`Profile::reserve`] took.
    pub fn unreserve(&self, pod: &PendingPod, snapshot: &mut Snapshot) {
        for place in self.reserve.iter().rev() {
            self.plugin(*place).unreserve(pod, snapshot);
        }
    }

    /// The plugin with this place.
    pub fn plugin(&self, index: u8) -> &dyn Plugin {
        &*self.plugins[usize::from(index)]
    }
}

fn make(config: &ProfileConfig, plugin: &str) -> Result<Arc<dyn Plugin>, ProfileError> {
    let profile = config.scheduler_name.clone();
    match plugins::make(plugin, config.arguments(plugin)) {
        Some(Ok(plugin)) => Ok(plugin),
        Some(Err(cause)) => {
            Err(ProfileError::Arguments { profile, plugin: plugin.to_owned(), cause: cause.to_string() })
        }
        None => Err(ProfileError::UnknownPlugin { profile, plugin: plugin.to_owned() }),
    }
}

/// Carries out the `enabled` list of one extension point.
fn enable_at(
    config: &ProfileConfig,
    chosen: &mut Vec<Chosen>,
    point_name: &'static str,
    point: Points,
    set: &PluginSet,
) -> Result<(), ProfileError> {
    let profile = &config.scheduler_name;
    for enabled in &set.enabled {
        let known = chosen.iter().position(|chosen| chosen.plugin.name() == enabled.name);
        let index = match known {
            Some(index) => index,
            None => {
                let plugin = make(config, &enabled.name)?;
                let disabled = Points(u16::MAX);
                chosen.push(Chosen { plugin, weight: 1, disabled });
                chosen.len() - 1
            }
        };
        let entry = &mut chosen[index];
        if !entry.plugin.points().contains(point) {
            return Err(ProfileError::WrongPoint {
                profile: profile.clone(),
                plugin: enabled.name.clone(),
                point: point_name,
            });
        }
        entry.disabled = Points(entry.disabled.0 & !point.0);
        if point == Points::SCORE {
            entry.weight = enabled.weight.unwrap_or(entry.weight);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Configuration;

    fn profile(yaml: &str) -> Result<Profile, ProfileError> {
        let yaml = format!(
            "apiVersion: kubescheduler.config.k8s.io/v1\nkind: KubeSchedulerConfiguration\nprofiles:\n- schedulerName: s\n{yaml}"
        );
        let configuration = Configuration::parse(&yaml).expect("configuration");
        Profile::build(&configuration.profiles[0], None)
    }

    fn names(profile: &Profile, places: &[u8]) -> Vec<&'static str> {
        places.iter().map(|place| profile.plugin(*place).name()).collect()
    }

    fn score_weight(profile: &Profile, name: &str) -> Option<i64> {
        profile.score.iter().find(|(place, _)| profile.plugin(*place).name() == name).map(|(_, weight)| *weight)
    }

    #[test]
    fn the_default_profile_has_the_default_plugins_and_weights() {
        let profile = Profile::default_profile().expect("default");
        assert_eq!(
            names(&profile, &profile.filter),
            [
                "NodeUnschedulable",
                "NodeName",
                "TaintToleration",
                "NodeAffinity",
                "NodePorts",
                "NodeResourcesFit",
                "VolumeRestrictions",
                "NodeVolumeLimits",
                "VolumeBinding",
                "VolumeZone",
                "PodTopologySpread",
                "InterPodAffinity",
                "DynamicResources",
                "NodeDeclaredFeatures"
            ]
        );
        assert_eq!(score_weight(&profile, "TaintToleration"), Some(3));
        assert_eq!(score_weight(&profile, "PodTopologySpread"), Some(2));
        assert_eq!(score_weight(&profile, "ImageLocality"), Some(1));
        assert_eq!(names(&profile, &profile.bind), ["DefaultBinder"]);
    }

    #[test]
    fn plugins_are_disabled_and_reweighted_by_point() {
        let profile = profile(
            "  plugins:\n    score:\n      disabled: [{name: ImageLocality}]\n      enabled: [{name: NodeResourcesFit, weight: 7}]\n    multiPoint:\n      disabled: [{name: NodePorts}]",
        )
        .expect("profile");
        assert_eq!(score_weight(&profile, "ImageLocality"), None);
        assert_eq!(score_weight(&profile, "NodeResourcesFit"), Some(7));
        assert!(!names(&profile, &profile.filter).contains(&"NodePorts"));
    }

    #[test]
    fn a_star_disables_all_others() {
        let profile =
            profile("  plugins:\n    score:\n      disabled: [{name: '*'}]\n      enabled: [{name: ImageLocality}]")
                .expect("profile");
        assert_eq!(profile.score.len(), 1);
        assert_eq!(score_weight(&profile, "ImageLocality"), Some(1));
    }

    #[test]
    fn wrong_configurations_are_named() {
        let cases = [
            ("  plugins:\n    filter:\n      enabled: [{name: Nonsense}]", "plugin \"Nonsense\" does not exist"),
            (
                "  plugins:\n    bind:\n      enabled: [{name: NodePorts}]",
                "plugin \"NodePorts\" does not extend the bind point",
            ),
            ("  plugins:\n    bind:\n      disabled: [{name: '*'}]", "at least one bind plugin"),
        ];
        for (yaml, words) in cases {
            let error = profile(yaml).expect_err(yaml).to_string();
            assert!(error.contains(words), "{error} should contain {words}");
        }
    }
}
