//! Who is at the other end of a link: mutual TLS 1.3. A router's certificate carries its name in the directory, and is
//! signed by the one authority that all of them have.

use std::{io, path::Path, sync::Arc};

use rustls::{
    ClientConfig, ClientConnection, Connection, RootCertStore, ServerConfig, ServerConnection,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
    server::WebPkiClientVerifier,
    version::{TLS12, TLS13},
};

use crate::config;

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsError {
    #[error("cannot read {path}: {source}; `freeflow pki` makes such files")]
    File { path: String, source: rustls::pki_types::pem::Error },
    #[error("the certificates do not serve: {0}")]
    Use(#[from] rustls::Error),
    #[error("the authority of [links] does not serve: {0}")]
    Authority(#[from] rustls::server::VerifierBuilderError),
    #[error("{0:?} cannot stand in a certificate; use letters, digits, - and .")]
    Name(String),
    #[error("[links] lacks `{0}`, which security = \"tls\" needs")]
    Missing(&'static str),
    #[error("[directory] lacks `authority`, which https needs")]
    MissingOfDirectory,
}

/// The two sides of the handshake.
#[derive(Clone, Debug)]
pub(crate) struct Tls {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl Tls {
    /// Reads the files that the configuration names.
    pub(crate) fn load(links: &config::Links) -> Result<Self, TlsError> {
        let path = |path: &'_ Option<_>, what| path.clone().ok_or(TlsError::Missing(what));
        if ServerName::try_from(&*links.name).is_err() {
            return Err(TlsError::Name(links.name.clone()));
        }
        let authority = path(&links.authority, "authority")?;
        let certificate = path(&links.certificate, "certificate")?;
        let key = path(&links.key, "key")?;
        let mut roots = RootCertStore::empty();
        for root in certificates(&authority)? {
            roots.add(root)?;
        }
        let (roots, chain) = (Arc::new(roots), certificates(&certificate)?);
        let secret = || PrivateKeyDer::from_pem_file(&key).map_err(|source| unreadable(&key, source));
        let provider = Arc::new(ring::default_provider());
        let client = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&TLS13])?
            .with_root_certificates(Arc::clone(&roots))
            .with_client_auth_cert(chain.clone(), secret()?)?;
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider)).build()?;
        let server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, secret()?)?;
        Ok(Self { client: Arc::new(client), server: Arc::new(server) })
    }

    /// The side that connects to the router of that name.
    pub(super) fn dial(&self, name: &str) -> io::Result<Connection> {
        let name = ServerName::try_from(name.to_owned()).map_err(io::Error::other)?;
        let connection = ClientConnection::new(Arc::clone(&self.client), name);
        Ok(connection.map_err(io::Error::other)?.into())
    }

    /// The side that was connected to.
    pub(super) fn accept(&self) -> io::Result<Connection> {
        let connection = ServerConnection::new(Arc::clone(&self.server));
        Ok(connection.map_err(io::Error::other)?.into())
    }
}

/// How the servers of an etcd are recognised, and what is shown to them.
pub(crate) fn etcd_tls(directory: &config::Directory) -> Result<ClientConfig, TlsError> {
    let authority = directory.authority.as_deref().ok_or(TlsError::MissingOfDirectory)?;
    let mut roots = RootCertStore::empty();
    for root in certificates(authority)? {
        roots.add(root)?;
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[&TLS13, &TLS12])?
        .with_root_certificates(roots);
    let (Some(certificate), Some(key)) = (&directory.certificate, &directory.key) else {
        return Ok(builder.with_no_client_auth());
    };
    let secret = PrivateKeyDer::from_pem_file(key).map_err(|source| unreadable(key, source))?;
    Ok(builder.with_client_auth_cert(certificates(certificate)?, secret)?)
}

/// Whether the certificate of the other end, which the handshake has verified, carries this name.
pub(super) fn is_named(connection: &Connection, name: &str) -> bool {
    let certificate = connection.peer_certificates().and_then(|chain| chain.first());
    let (Some(certificate), Ok(name)) = (certificate, ServerName::try_from(name)) else { return false };
    webpki::EndEntityCert::try_from(certificate)
        .is_ok_and(|certificate| certificate.verify_is_valid_for_subject_name(&name).is_ok())
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = || CertificateDer::pem_file_iter(path)?.collect::<Result<Vec<_>, _>>();
    read().map_err(|source| unreadable(path, source))
}

fn unreadable(path: &Path, source: rustls::pki_types::pem::Error) -> TlsError {
    TlsError::File { path: path.display().to_string(), source }
}

#[cfg(test)]
mod tests {
    use std::io;

    use tempfile::TempDir;

    use super::*;
    use crate::{config::Security, pki};

    /// A router's side, with a certificate of the authority in a directory.
    fn side(directory: &Path, name: &str) -> Tls {
        let files = pki::issue(directory, name).unwrap();
        Tls::load(&config::Links {
            name: name.to_owned(),
            listen: ([127, 0, 0, 1], 1).into(),
            address: None,
            security: Security::Tls,
            streams: 4,
            authority: Some(directory.join("ca.pem")),
            certificate: Some(files.certificate),
            key: Some(files.key),
        })
        .unwrap()
    }

    /// Lets two ends shake hands.
    fn meet(
        mut client: Connection,
        mut server: Connection,
    ) -> Result<(Connection, Connection), rustls::Error> {
        for _ in 0..10 {
            let (mut there, mut back) = (Vec::new(), Vec::new());
            while client.wants_write() {
                client.write_tls(&mut there).unwrap();
            }
            server.read_tls(&mut &there[..]).unwrap();
            server.process_new_packets()?;
            while server.wants_write() {
                server.write_tls(&mut back).unwrap();
            }
            client.read_tls(&mut &back[..]).unwrap();
            client.process_new_packets()?;
        }
        assert!(!client.is_handshaking() && !server.is_handshaking());
        Ok((client, server))
    }

    #[test]
    fn routers_of_one_authority_know_each_other_by_name_and_no_others() {
        let (site, other) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        pki::authority(site.path()).unwrap();
        pki::authority(other.path()).unwrap();
        let (a, b) = (side(site.path(), "host-a"), side(site.path(), "host-b"));
        let stranger = side(other.path(), "host-b");

        let (client, server) = meet(a.dial("host-b").unwrap(), b.accept().unwrap()).unwrap();
        assert!(is_named(&client, "host-b") && !is_named(&client, "host-a"));
        assert!(is_named(&server, "host-a") && !is_named(&server, "host-b"));
        assert!(meet(a.dial("host-c").unwrap(), b.accept().unwrap()).is_err(), "another name");
        assert!(meet(a.dial("host-b").unwrap(), stranger.accept().unwrap()).is_err(), "a false server");
        assert!(meet(stranger.dial("host-b").unwrap(), b.accept().unwrap()).is_err(), "a false client");
    }

    #[test]
    fn keys_are_their_owners_alone_and_never_overwritten() {
        use std::os::unix::fs::PermissionsExt;

        let site = TempDir::new().unwrap();
        let files = pki::authority(site.path()).unwrap();
        let mode = std::fs::metadata(&files.key).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let again = pki::authority(site.path()).unwrap_err();
        assert!(
            matches!(again, pki::PkiError::File { source, .. } if source.kind() == io::ErrorKind::AlreadyExists)
        );
    }
}
