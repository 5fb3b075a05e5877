//! A network that breaks where it hurts most: at a COMMIT.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering::SeqCst},
    },
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
};

/// What becomes of a connection through which a COMMIT is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// It is gone before the server hears of it.
    Before,
    /// It is gone as soon as it is passed on; nobody knows what the server does.
    During,
    /// It is gone when the server has committed, and before the client hears of it.
    After,
}

type Next = dyn FnMut() -> Option<Cut> + Send;

/// Passes bytes on to a server. Ends when it is dropped.
pub struct CommitProxy {
    address: SocketAddr,
    server: Arc<AtomicU16>,
    next: Arc<Mutex<Box<Next>>>,
    /// Whether new connections are refused from the next cut on.
    pub refuse_after_cut: Arc<AtomicBool>,
    refuse: Arc<AtomicBool>,
    cuts: Arc<AtomicUsize>,
    sever: Arc<watch::Sender<()>>,
    _connections: JoinSet<()>,
}

impl CommitProxy {
    pub async fn before(port: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let next: Arc<Mutex<Box<Next>>> = Arc::new(Mutex::new(Box::new(|| None)));
        let (refuse_after_cut, refuse): (Arc<AtomicBool>, Arc<AtomicBool>) = Default::default();
        let cuts = Arc::<AtomicUsize>::default();
        let sever = Arc::new(watch::Sender::new(()));
        let server = Arc::new(AtomicU16::new(port));
        let leads_to = Arc::clone(&server);
        let mut connections = JoinSet::new();
        let pass = Passing {
            next: Arc::clone(&next),
            refuse_after_cut: Arc::clone(&refuse_after_cut),
            refuse: Arc::clone(&refuse),
            cuts: Arc::clone(&cuts),
            sever: Arc::clone(&sever),
        };
        connections.spawn(async move {
            let mut passing = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                while passing.try_join_next().is_some() {}
                if pass.refuse.load(SeqCst) {
                    continue;
                }
                // One that is cut while it is still being made is cut, too.
                let severed = pass.sever.subscribe();
                let Ok(server) = TcpStream::connect(("127.0.0.1", leads_to.load(SeqCst))).await else {
                    continue;
                };
                passing.spawn(pass.clone().pass(client, server, severed));
            }
        });
        Self {
            address,
            server,
            next,
            refuse_after_cut,
            refuse,
            cuts,
            sever,
            _connections: connections,
        }
    }

    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// New connections lead to another server.
    pub fn lead_to(&self, port: u16) {
        self.server.store(port, SeqCst);
    }

    /// The next COMMIT meets this.
    pub fn cut_once(&self, cut: Cut) {
        let mut once = Some(cut);
        self.cut_by(move || once.take());
    }

    /// Each COMMIT meets what this says.
    pub fn cut_by(&self, next: impl FnMut() -> Option<Cut> + Send + 'static) {
        *self.next.lock().unwrap() = Box::new(next);
    }

    /// Cuts all connections that stand, whatever they are at.
    pub fn sever(&self) {
        self.sever.send_replace(());
    }

    /// How many COMMITs were cut.
    pub fn cuts(&self) -> usize {
        self.cuts.load(SeqCst)
    }

    /// New connections get through again.
    pub fn mend(&self) {
        self.refuse_after_cut.store(false, SeqCst);
        self.refuse.store(false, SeqCst);
    }
}

#[derive(Clone)]
struct Passing {
    next: Arc<Mutex<Box<Next>>>,
    refuse_after_cut: Arc<AtomicBool>,
    refuse: Arc<AtomicBool>,
    cuts: Arc<AtomicUsize>,
    sever: Arc<watch::Sender<()>>,
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

impl Passing {
    async fn pass(self, mut client: TcpStream, mut server: TcpStream, mut severed: watch::Receiver<()>) {
        let _ = (client.set_nodelay(true), server.set_nodelay(true));
        let (mut asked, mut answered) = (vec![0; 64 * 1024], vec![0; 64 * 1024]);
        loop {
            tokio::select! {
                _ = severed.changed() => return,
                read = client.read(&mut asked) => {
                    let Ok(length @ 1..) = read else { return };
                    let asked = &asked[..length];
                    let cut = match contains(asked, b"COMMIT") {
                        true => (self.next.lock().unwrap())(),
                        false => None,
                    };
                    if cut.is_some() {
                        self.cuts.fetch_add(1, SeqCst);
                        self.refuse.store(self.refuse_after_cut.load(SeqCst), SeqCst);
                    }
                    if cut == Some(Cut::Before) || server.write_all(asked).await.is_err() {
                        return;
                    }
                    match cut {
                        None => {}
                        Some(Cut::After) => {
                            while let Ok(length @ 1..) = server.read(&mut answered).await {
                                // The tag of the command.
                                if contains(&answered[..length], b"COMMIT") || contains(&answered[..length], b"ROLLBACK") {
                                    break;
                                }
                            }
                            return;
                        }
                        Some(_) => return,
                    }
                }
                read = server.read(&mut answered) => {
                    let Ok(length @ 1..) = read else { return };
                    if client.write_all(&answered[..length]).await.is_err() {
                        return;
                    }
                }
            }
        }
    }
}
