//! A network of the test's own between a store and its server.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, tcp::OwnedReadHalf, tcp::OwnedWriteHalf},
    sync::watch,
    task::JoinSet,
};

/// What becomes of the answers to what is sent through connections that stand, and of new connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weather {
    /// They arrive.
    Clear,
    /// The next answer is swallowed, and its connection with it; then it is clear again.
    LoseAnswer,
    /// They arrive this much later.
    Slow(Duration),
    /// The next answer is cut off in its middle, and its connection with it; then it is clear again.
    CutAnswer,
    /// Nothing arrives anywhere, and nobody is told. New connections are clear.
    BlackHole,
}

/// Passes bytes on, in the weather that the test makes. Ends when it is dropped.
pub struct Proxy {
    address: SocketAddr,
    weather: Arc<Mutex<watch::Sender<Weather>>>,
    flights: Arc<AtomicU64>,
    _connections: JoinSet<()>,
}

impl Proxy {
    pub async fn before(port: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let weather = Arc::new(Mutex::new(watch::Sender::new(Weather::Clear)));
        let mut connections = JoinSet::new();
        let sky = Arc::clone(&weather);
        let flights = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&flights);
        connections.spawn(async move {
            let mut passing = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let server = TcpStream::connect(("127.0.0.1", port)).await;
                let Ok(server) = server else { continue };
                passing.spawn(pass(client, server, Arc::clone(&sky), Arc::clone(&count)));
            }
        });
        Self {
            address,
            weather,
            flights,
            _connections: connections,
        }
    }

    pub fn url(&self) -> String {
        format!("redis://{}", self.address)
    }

    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// How often something came from a client, on all connections together.
    pub fn flights(&self) -> u64 {
        self.flights.load(Relaxed)
    }

    /// For connections that stand now.
    pub fn make(&self, weather: Weather) {
        self.weather.lock().unwrap().send_replace(weather);
    }

    /// New connections are under a sky of their own; those that stand keep theirs.
    pub fn black_hole(&self) {
        let mut sky = self.weather.lock().unwrap();
        sky.send_replace(Weather::BlackHole);
        *sky = watch::Sender::new(Weather::Clear);
    }

    pub fn weather(&self) -> Weather {
        *self.weather.lock().unwrap().borrow()
    }
}

async fn pass(client: TcpStream, server: TcpStream, sky: Arc<Mutex<watch::Sender<Weather>>>, flights: Arc<AtomicU64>) {
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let own = sky.lock().unwrap().clone();
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    tokio::select! {
        () = requests(from_client, to_server, own.clone(), &flights) => {}
        () = answers(from_server, to_client, own) => {}
    }
}

async fn requests(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, sky: watch::Sender<Weather>, flights: &AtomicU64) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        flights.fetch_add(1, Relaxed);
        if *sky.borrow() == Weather::BlackHole {
            continue;
        }
        if to.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
}

async fn answers(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, sky: watch::Sender<Weather>) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        let weather = *sky.borrow();
        match weather {
            Weather::Clear => {
                if to.write_all(&buffer[..length]).await.is_err() {
                    return;
                }
            }
            Weather::Slow(time) => {
                tokio::time::sleep(time).await;
                if to.write_all(&buffer[..length]).await.is_err() {
                    return;
                }
            }
            Weather::CutAnswer => {
                let _ = to.write_all(&buffer[..length.div_ceil(2)]).await;
                sky.send_replace(Weather::Clear);
                return;
            }
            Weather::LoseAnswer => {
                sky.send_replace(Weather::Clear);
                return;
            }
            Weather::BlackHole => {}
        }
    }
}
