//! ServiceAccounts.

use crate::registry::rules::Rules;

pub const RULES: Rules = Rules::DEFAULT;
