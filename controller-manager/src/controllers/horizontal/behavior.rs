//! How far an autoscaler may go at once: bounds, stabilisation, policies. Pure.
use k8s_openapi::{
    api::autoscaling::v2::{HPAScalingRules, HorizontalPodAutoscalerBehavior},
    jiff::Timestamp,
};
use std::time::Duration;

/// What is remembered of one autoscaler. Older entries go as new ones come.
#[derive(Debug, Default)]
pub struct Memory {
    /// What was recommended, and when.
    recommended: Vec<(i32, Timestamp)>,
    /// By how much it was scaled, and when.
    scaled: Vec<(i32, Timestamp)>,
}

/// The longest that anything is remembered: no window and no period may be longer.
const LONGEST: i64 = 3600;

/// A condition's value, reason and message.
pub type Says = (bool, &'static str, &'static str);

/// The size to go to, with what the conditions `AbleToScale` and `ScalingLimited` say.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Decision {
    pub replicas: i32,
    pub able: Says,
    pub limited: Says,
}

/// What bounds a decision.
#[derive(Clone, Copy, Debug)]
pub struct Bounds<'a> {
    pub current: i32,
    pub least: i32,
    pub most: i32,
    pub behavior: Option<&'a HorizontalPodAutoscalerBehavior>,
    /// `--horizontal-pod-autoscaler-downscale-stabilization`.
    pub downscale_window: Duration,
}

impl Memory {
    /// At first what is there counts as recommended, lest a restart forget it.
    pub fn begin(&mut self, current: i32, now: Timestamp) {
        if self.recommended.is_empty() {
            self.recommended.push((current, now));
        }
    }

    pub fn scaled(&mut self, by: i32, now: Timestamp) {
        self.scaled.push((by, now));
    }

    fn recent<'a>(entries: &'a [(i32, Timestamp)], seconds: i64, now: Timestamp) -> impl Iterator<Item = i32> + 'a {
        entries.iter().filter(move |(_, at)| now.duration_since(*at).as_secs() < seconds).map(|(n, _)| *n)
    }

    /// Replicas that came and that went in the last seconds.
    fn changes(&self, seconds: i64, now: Timestamp) -> (i32, i32) {
        let up = Self::recent(&self.scaled, seconds, now).filter(|by| *by > 0).sum();
        let down: i32 = Self::recent(&self.scaled, seconds, now).filter(|by| *by < 0).sum();
        (up, -down)
    }

    /// As `normalizeDesiredReplicas` and `normalizeDesiredReplicasWithBehaviors`.
    pub fn decide(&mut self, wanted: i32, bounds: Bounds<'_>, now: Timestamp) -> Decision {
        self.recommended.retain(|(_, at)| now.duration_since(*at).as_secs() <= LONGEST);
        self.scaled.retain(|(_, at)| now.duration_since(*at).as_secs() <= LONGEST);
        let Bounds { current, least, most, behavior, downscale_window } = bounds;
        let rules = |of: fn(&HorizontalPodAutoscalerBehavior) -> Option<&HPAScalingRules>| behavior.and_then(of);
        let (up, down) = (rules(|b| b.scale_up.as_ref()), rules(|b| b.scale_down.as_ref()));
        let window =
            |rules: Option<&HPAScalingRules>| rules.and_then(|r| r.stabilization_window_seconds).map(i64::from);
        let down_window = window(down).unwrap_or(i64::try_from(downscale_window.as_secs()).unwrap_or(LONGEST));
        let lowest = Self::recent(&self.recommended, window(up).unwrap_or(0), now).fold(wanted, i32::min);
        let highest = Self::recent(&self.recommended, down_window, now).fold(wanted, i32::max);
        self.recommended.push((wanted, now));
        // Upwards the lowest of late counts, downwards the highest; without any behaviour the highest alone.
        let stable = if behavior.is_some() { current.max(lowest).min(highest) } else { highest };
        let able = match stable {
            _ if stable == wanted => (true, "ReadyForNewScale", "recommended size matches current size"),
            _ if wanted > stable => (
                true,
                "ScaleUpStabilized",
                "recent recommendations were lower than current one, applying the lowest recent recommendation",
            ),
            _ => (
                true,
                "ScaleDownStabilized",
                "recent recommendations were higher than current one, applying the highest recent recommendation",
            ),
        };
        let in_range = (false, "DesiredWithinRange", "the desired count is within the acceptable range");
        let (replicas, limited) = if stable > current {
            let limit = self.up_limit(current, behavior.is_some(), up, now).max(current);
            let too_fast = "the desired replica count is increasing faster than the maximum scale rate";
            let too_many = "the desired replica count is more than the maximum replica count";
            match stable > limit.min(most) {
                true if limit < most => (limit, (true, "ScaleUpLimit", too_fast)),
                true => (most, (true, "TooManyReplicas", too_many)),
                false => (stable, in_range),
            }
        } else {
            let limit = self.down_limit(current, down, now).min(current);
            let too_fast = "the desired replica count is decreasing faster than the maximum scale rate";
            let too_few = "the desired replica count is less than the minimum replica count";
            match stable < limit.max(least) {
                true if limit > least => (limit, (true, "ScaleDownLimit", too_fast)),
                true => (least, (true, "TooFewReplicas", too_few)),
                false => (stable, in_range),
            }
        };
        Decision { replicas, able, limited }
    }

    /// As `calculateScaleUpLimitWithScalingRules`; without any behaviour as `calculateScaleUpLimit`.
    fn up_limit(&self, current: i32, behaves: bool, rules: Option<&HPAScalingRules>, now: Timestamp) -> i32 {
        if !behaves {
            return current.saturating_mul(2).max(4);
        }
        let grown = |start: f64, kind: &str, value: f64| match kind {
            "Percent" => (start * (1.0 + value / 100.0)).ceil(),
            _ => start + value,
        };
        let of = |kind: &str, value: i32, seconds: i64| {
            let (up, down) = self.changes(seconds, now);
            grown(f64::from(current - up + down), kind, f64::from(value)) as i32
        };
        let Some(rules) = rules else { return of("Pods", 4, 15).max(of("Percent", 100, 15)) };
        let all = rules.policies.iter().flatten().map(|p| of(&p.type_, p.value, i64::from(p.period_seconds)));
        match rules.select_policy.as_deref() {
            Some("Disabled") => current,
            Some("Min") => all.min().unwrap_or(current),
            _ => all.max().unwrap_or(current),
        }
    }

    /// As `calculateScaleDownLimitWithBehaviors`.
    fn down_limit(&self, current: i32, rules: Option<&HPAScalingRules>, now: Timestamp) -> i32 {
        let Some(rules) = rules else { return 0 };
        let all = rules.policies.iter().flatten().map(|policy| {
            let (up, down) = self.changes(i64::from(policy.period_seconds), now);
            let (start, value) = (f64::from(current + down - up), f64::from(policy.value));
            match policy.type_.as_str() {
                "Percent" => (start * (1.0 - value / 100.0)) as i32,
                _ => (start - value) as i32,
            }
        });
        match rules.select_policy.as_deref() {
            Some("Disabled") => current,
            Some("Min") => all.max().unwrap_or(0),
            _ => all.min().unwrap_or(0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + second).unwrap()
    }

    /// Wants one size after the other, 10 s apart; gives where it went, with the reasons of the last decision.
    fn play(behavior: Value, start: i32, wanted: &[i32]) -> (Vec<i32>, &'static str, &'static str) {
        let behavior: Option<HorizontalPodAutoscalerBehavior> = serde_json::from_value(behavior).unwrap();
        let (mut memory, mut current, mut went, mut reasons) = (Memory::default(), start, Vec::new(), ("", ""));
        memory.begin(start, at(0));
        for (step, wanted) in wanted.iter().enumerate() {
            let now = at(10 * (step as i64 + 1));
            let bounds = Bounds {
                current,
                least: 2,
                most: 50,
                behavior: behavior.as_ref(),
                downscale_window: Duration::from_secs(30),
            };
            let decision = memory.decide(*wanted, bounds, now);
            if decision.replicas != current {
                memory.scaled(decision.replicas - current, now);
            }
            current = decision.replicas;
            went.push(current);
            reasons = (decision.able.1, decision.limited.1);
        }
        (went, reasons.0, reasons.1)
    }

    #[test]
    fn sizes_stay_within_bounds_and_rates() {
        let policy =
            |kind: &str, value: i32, period: i32| json!({"type": kind, "value": value, "periodSeconds": period});
        let up = |window: i32, policies: Value| json!({"scaleUp": {"stabilizationWindowSeconds": window, "policies": policies}});
        let down = |select: &str, policies: Value| json!({"scaleDown": {"stabilizationWindowSeconds": 0, "selectPolicy": select, "policies": policies}});
        let pods = policy("Pods", 2, 60);
        let half = policy("Percent", 50, 60);
        for (name, behavior, start, wanted, went, able, limited) in [
            ("twice at once", Value::Null, 3, vec![20], vec![6], "ReadyForNewScale", "ScaleUpLimit"),
            ("four are always allowed", Value::Null, 1, vec![20], vec![4], "ReadyForNewScale", "ScaleUpLimit"),
            ("not beyond the most", Value::Null, 30, vec![80], vec![50], "ReadyForNewScale", "TooManyReplicas"),
            (
                "nor below the least",
                Value::Null,
                3,
                vec![0, 0, 0, 0],
                vec![3, 3, 2, 2],
                "ReadyForNewScale",
                "TooFewReplicas",
            ),
            (
                "the highest of late",
                Value::Null,
                9,
                vec![5, 4, 3, 3, 3],
                vec![9, 9, 5, 4, 3],
                "ReadyForNewScale",
                "DesiredWithinRange",
            ),
            (
                "the highest of late upwards too",
                Value::Null,
                3,
                vec![9, 4],
                vec![6, 9],
                "ScaleDownStabilized",
                "DesiredWithinRange",
            ),
            ("held back downwards", Value::Null, 9, vec![5], vec![9], "ScaleDownStabilized", "DesiredWithinRange"),
            (
                "two pods a minute",
                up(0, json!([pods])),
                3,
                vec![20, 20],
                vec![5, 5],
                "ReadyForNewScale",
                "ScaleUpLimit",
            ),
            (
                "the more of both",
                up(0, json!([pods, half])),
                10,
                vec![20],
                vec![15],
                "ReadyForNewScale",
                "ScaleUpLimit",
            ),
            (
                "the lowest of late",
                up(60, json!([pods])),
                3,
                vec![5],
                vec![3],
                "ScaleUpStabilized",
                "DesiredWithinRange",
            ),
            (
                "half a minute",
                down("Max", json!([half])),
                20,
                vec![2, 2],
                vec![10, 10],
                "ReadyForNewScale",
                "ScaleDownLimit",
            ),
            (
                "the less of both",
                down("Min", json!([pods, half])),
                20,
                vec![2],
                vec![18],
                "ReadyForNewScale",
                "ScaleDownLimit",
            ),
            (
                "never down",
                down("Disabled", json!([pods])),
                20,
                vec![2],
                vec![20],
                "ReadyForNewScale",
                "ScaleDownLimit",
            ),
        ] {
            assert_eq!(play(behavior, start, &wanted), (went, able, limited), "{name}");
        }
    }
}
