//! The directory that is a file: the same on all hosts, read once.

use std::io;

use super::{
    Directory,
    view::{Change, View},
};
use crate::{config::DirectoryFile, status};

impl Directory {
    /// What the file says to the router `own` with these tenants, by their numbers. Routes of tenants that it does not
    /// have are none of its business.
    pub(super) fn from_file(file: &DirectoryFile, own: &str, tenants: &[String]) -> io::Result<Self> {
        let mut view = View::new(own);
        for (name, address) in &file.routers {
            view.apply(&Change::Router(name.clone(), *address)).map_err(io::Error::other)?;
        }
        let mut listed = Vec::new();
        for route in &file.routes {
            let Some((_, tenant)) = tenants.iter().zip(0..).find(|(name, _)| **name == route.tenant) else {
                continue;
            };
            view.add_prefix(tenant, route.prefix, &route.router).map_err(io::Error::other)?;
            listed.push(status::Route {
                tenant: route.tenant.clone(),
                prefix: route.prefix.to_string(),
                router: route.router.clone(),
            });
        }
        Ok(Self { listed, ..Self::new("file", view, own, tenants)? })
    }
}

#[cfg(test)]
mod tests {
    use engine::Routing;

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
        let directory = Directory::from_file(&file, "a", &["red".to_owned(), "blue".to_owned()]).unwrap();
        let (b, c) = (directory.number("b"), directory.number("c"));
        assert!(b.is_some() && c.is_some() && b != c && directory.number("a").is_none());
        let gid = |third| [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 1, third, 9];
        for (tenant, third, expected) in
            [(1, 1, b), (1, 2, c), (1, 3, None), (0, 1, c), (0, 2, c), (2, 1, None)]
        {
            assert_eq!(directory.route(tenant, &gid(third)), expected, "{tenant} {third}");
        }
        assert_eq!(directory.route(1, &[0xfd; 16]), None);
    }
}
