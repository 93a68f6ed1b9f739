//! Certificates for links: an authority of the site's own, and what it signs for each router.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose,
};

/// Why no certificate was made.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A file cannot be read or made.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The authority's files are none, or the name cannot stand in a certificate.
    #[error(transparent)]
    Make(#[from] rcgen::Error),
}

/// The files of an authority, or of a router.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    /// The certificate, PEM.
    pub certificate: PathBuf,
    /// The secret key, PEM; its owner's alone.
    pub key: PathBuf,
}

impl Files {
    fn of(directory: &Path, name: &str) -> Self {
        let file = |end| directory.join(format!("{name}.{end}"));
        Self { certificate: file("pem"), key: file("key") }
    }

    fn write(&self, certificate: &str, key: &str) -> Result<(), PkiError> {
        create(&self.key, key, 0o600)?;
        create(&self.certificate, certificate, 0o644)
    }
}

/// Makes an authority in a directory: `ca.pem`, which every router gets, and `ca.key`, which none does. Files that are
/// there are left alone.
///
/// # Errors
/// [`PkiError`], also where there is one already.
pub fn authority(directory: &Path) -> Result<Files, PkiError> {
    fs::create_dir_all(directory).map_err(at(directory))?;
    let params = authority_params();
    let key = KeyPair::generate()?;
    let certificate = params.self_signed(&key)?;
    let files = Files::of(directory, "ca");
    files.write(&certificate.pem(), &key.serialize_pem())?;
    Ok(files)
}

/// What every authority says of itself; they differ in their keys.
fn authority_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "FreeFlow routers");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

/// Makes what the router of that name needs, signed by the authority of the directory.
///
/// # Errors
/// [`PkiError`], also where it was made already.
pub fn issue(directory: &Path, name: &str) -> Result<Files, PkiError> {
    let ca = Files::of(directory, "ca");
    let signer = KeyPair::from_pem(&fs::read_to_string(&ca.key).map_err(at(&ca.key))?)?;
    let issuer = Issuer::new(authority_params(), signer);
    let mut params = CertificateParams::new([name.to_owned()])?;
    // No common name: nobody looks for one in a certificate that has alternative names, and etcd refuses, at its JSON gateway,
    // whoever shows one.
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "FreeFlow routers");
    params.distinguished_name.push(DnType::OrganizationalUnitName, name);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let key = KeyPair::generate()?;
    let certificate = params.signed_by(&key, &issuer)?;
    let files = Files::of(directory, name);
    files.write(&certificate.pem(), &key.serialize_pem())?;
    Ok(files)
}

/// Makes a file that is not there.
fn create(path: &Path, text: &str, mode: u32) -> Result<(), PkiError> {
    let made = OpenOptions::new().write(true).create_new(true).mode(mode).open(path);
    made.and_then(|mut file| file.write_all(text.as_bytes())).map_err(at(path))
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> PkiError {
    move |source| PkiError::File { path: path.to_owned(), source }
}
