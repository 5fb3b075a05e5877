//! Certificates for servers and clients, made by the package openssl.

use std::{fs, path::PathBuf, process::Command};

use tempfile::TempDir;

/// An authority that nobody else trusts, with a server's and a client's certificate of its making.
pub struct Authority {
    folder: TempDir,
}

impl Authority {
    pub fn new() -> Self {
        let authority = Self {
            folder: tempfile::tempdir().expect("a folder"),
        };
        authority.openssl("req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=authority -keyout authority.key -out authority.crt");
        fs::write(
            authority.path("names"),
            "subjectAltName=DNS:localhost,IP:127.0.0.1\nbasicConstraints=CA:FALSE\n",
        )
        .expect("it is written");
        for name in ["server", "client"] {
            authority.openssl(&format!("req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN={name} -keyout {name}.key -out {name}.csr"));
            authority.openssl(&format!("x509 -req -days 2 -in {name}.csr -CA authority.crt -CAkey authority.key -CAcreateserial -extfile names -out {name}.crt"));
        }
        authority
    }

    fn openssl(&self, words: &str) {
        let output = Command::new("openssl")
            .args(words.split(' '))
            .current_dir(self.folder.path())
            .output()
            .expect("the package openssl is installed");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).expect("it was made")
    }

    /// What makes a `redis-server` encrypt on that port. It asks for a client's certificate or not.
    pub fn options(&self, port: u16, asks: bool) -> Vec<String> {
        let path = |name| self.path(name).display().to_string();
        let pairs = [
            ("--tls-port", port.to_string()),
            ("--tls-cert-file", path("server.crt")),
            ("--tls-key-file", path("server.key")),
            ("--tls-ca-cert-file", path("authority.crt")),
            ("--tls-auth-clients", if asks { "yes" } else { "no" }.to_owned()),
        ];
        pairs
            .into_iter()
            .flat_map(|(name, value)| [name.to_owned(), value])
            .collect()
    }
}
