//! Which router serves an address: the engine's `Routing` over what the directory says.
//!
//! Leaves to others: where it comes from (the configuration's file), and the links to the routers (`link`).

use std::{net::SocketAddr, sync::Arc};

use engine::Routing;
use verbs_abi::proto::Gid;

use crate::{
    config::{DirectoryFile, Prefix},
    status,
};

/// A router of another host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Peer {
    pub(crate) name: String,
    pub(crate) address: SocketAddr,
}

/// What the directory says, as this router sees it.
#[derive(Debug)]
pub(crate) struct Directory {
    /// The other routers, by the engine's numbers.
    pub(crate) peers: Vec<Peer>,
    /// Longest prefixes first; no peer: this router's own.
    routes: Vec<(u32, Prefix, Option<u32>)>,
    /// What it says of these tenants, for the status.
    pub(crate) listed: Vec<status::Route>,
}

impl Directory {
    /// What the file says to the router `own` with these tenants, by their numbers. Routes of tenants that it does not
    /// have are none of its business.
    pub(crate) fn new(file: &DirectoryFile, own: &str, tenants: &[String]) -> Arc<Self> {
        let others = file.routers.iter().filter(|(name, _)| *name != own);
        let peers: Vec<Peer> =
            others.map(|(name, address)| Peer { name: name.clone(), address: *address }).collect();
        let number = |router: &str| peers.iter().zip(0..).find(|(peer, _)| peer.name == router);
        let mut routes: Vec<_> = file
            .routes
            .iter()
            .filter_map(|route| {
                let (_, tenant) = tenants.iter().zip(0..).find(|(name, _)| **name == route.tenant)?;
                Some((tenant, route.prefix, number(&route.router).map(|(_, number)| number)))
            })
            .collect();
        routes.sort_by_key(|(_, prefix, _)| std::cmp::Reverse(prefix.bits()));
        let known = file.routes.iter().filter(|route| tenants.contains(&route.tenant));
        let listed = known
            .map(|route| status::Route {
                tenant: route.tenant.clone(),
                prefix: route.prefix.to_string(),
                router: route.router.clone(),
            })
            .collect();
        Arc::new(Self { peers, routes, listed })
    }

    /// The number of a router.
    pub(crate) fn peer(&self, name: &str) -> Option<u32> {
        self.peers.iter().zip(0..).find(|(peer, _)| peer.name == name).map(|(_, number)| number)
    }
}

impl Routing for Directory {
    fn route(&self, tenant: u32, gid: &Gid) -> Option<u32> {
        let found = self.routes.iter().find(|(of, prefix, _)| *of == tenant && prefix.contains(gid));
        found.and_then(|(_, _, peer)| *peer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_prefix_of_the_tenant_counts_and_ones_own_leads_nowhere() {
        let file: DirectoryFile = toml::from_str(
            "[routers]\na = '10.0.0.1:1'\nb = '10.0.0.2:1'\nc = '10.0.0.3:1'\n\
             [[route]]\nprefix = '10.1.0.0/16'\nrouter = 'b'\ntenant = 'blue'\n\
             [[route]]\nprefix = '10.1.2.0/24'\nrouter = 'c'\ntenant = 'blue'\n\
             [[route]]\nprefix = '10.1.3.0/24'\nrouter = 'a'\ntenant = 'blue'\n\
             [[route]]\nprefix = '10.1.0.0/16'\nrouter = 'c'\ntenant = 'red'\n\
             [[route]]\nprefix = '0.0.0.0/0'\nrouter = 'c'\ntenant = 'green'\n",
        )
        .unwrap();
        let directory = Directory::new(&file, "a", &["red".to_owned(), "blue".to_owned()]);
        let (b, c) = (directory.peer("b"), directory.peer("c"));
        assert!(b.is_some() && c.is_some() && b != c && directory.peer("a").is_none());
        let gid = |third| [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 1, third, 9];
        for (tenant, third, expected) in
            [(1, 1, b), (1, 2, c), (1, 3, None), (0, 1, c), (0, 2, c), (2, 1, None)]
        {
            assert_eq!(directory.route(tenant, &gid(third)), expected, "{tenant} {third}");
        }
        assert_eq!(directory.route(1, &[0xfd; 16]), None);
    }
}
