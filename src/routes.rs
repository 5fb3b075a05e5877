//! Settings by route.

use std::{fmt, sync::Arc};

use crate::shared::Shared;

/// Patterns of paths, and what requests to each have in common.
#[derive(Clone, Default)]
pub(crate) struct Routes {
    patterns: matchit::Router<usize>,
    routes: Vec<(String, Arc<Shared>)>,
}

impl Routes {
    /// The settings of exactly this pattern.
    pub(crate) fn named(&self, pattern: &str) -> Option<&Arc<Shared>> {
        let named = self.routes.iter().find(|(known, _)| known == pattern);
        named.map(|(_, route)| route)
    }

    /// In place of what the pattern had.
    ///
    /// # Panics
    /// If the pattern is not one, or conflicts with another one.
    #[allow(clippy::panic, reason = "documented where users call it, and before any request")]
    pub(crate) fn put(&mut self, pattern: &str, route: Arc<Shared>) {
        if let Some((_, known)) = self.routes.iter_mut().find(|(known, _)| known == pattern) {
            *known = route;
            return;
        }
        if let Err(error) = self.patterns.insert(pattern, self.routes.len()) {
            panic!("{pattern:?} is not a route of its own: {error}");
        }
        self.routes.push((pattern.to_owned(), route));
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.routes.is_empty()
    }

    pub(crate) fn find(&self, path: &str) -> Option<&Arc<Shared>> {
        let found = self.patterns.at(path).ok()?;
        self.routes.get(*found.value).map(|(_, route)| route)
    }

    pub(crate) fn all_mut(&mut self) -> impl Iterator<Item = &mut Arc<Shared>> {
        self.routes.iter_mut().map(|(_, route)| route)
    }
}

impl fmt::Debug for Routes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let routes = self.routes.iter().map(|(pattern, route)| (pattern, &route.policy));
        f.debug_map().entries(routes).finish()
    }
}
