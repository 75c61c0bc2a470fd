//! The verb `pager`.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{ArgGroup, Args};
use log::LevelFilter;

use super::{exit_code, logging, output, run, value};
use crate::error::Error;
use crate::pager::{Contents, serve_machine, serve_pages};
use crate::snapshot::Snapshot;
use crate::sockets::LocalAddress;

/// The flags of `rvmm pager`.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("clients").required(true), group = ArgGroup::new("contents").required(true))]
pub(super) struct PagerArgs {
    /// Wait for a machine, rvmm restore --pager, at this Unix socket, and serve it until it ends
    #[arg(long, value_name = "PATH", group = "clients")]
    socket: Option<PathBuf>,
    /// Serve pages to rvmm pager --from at unix:PATH or tcp:HOST:PORT, where HOST is a loopback address
    #[arg(long, value_name = "WHERE", group = "clients", conflicts_with = "from", value_parser = OsStringValueParser::new().try_map(value::socket_address))]
    serve: Option<LocalAddress>,
    /// The folder of the snapshot whose memory is served
    #[arg(long, value_name = "DIR", group = "contents")]
    snapshot: Option<PathBuf>,
    /// Get the pages from the rvmm pager --serve at unix:PATH or tcp:HOST:PORT, and all of them as soon as possible
    #[arg(long, value_name = "WHERE", group = "contents", value_parser = OsStringValueParser::new().try_map(value::socket_address))]
    from: Option<LocalAddress>,
    /// Level of the log on standard error: off, error, warn, info, debug or trace [default: warn]
    #[arg(long, value_name = "LEVEL", value_parser = value::level)]
    log: Option<LevelFilter>,
}

/// What a pager is to do.
#[derive(Debug)]
pub(super) struct PagerTask {
    clients: Clients,
    source: Pages,
    level: LevelFilter,
}

#[derive(Debug, PartialEq, Eq)]
enum Clients {
    Machine(PathBuf),
    Pagers(LocalAddress),
}

#[derive(Debug, PartialEq, Eq)]
enum Pages {
    Snapshot(PathBuf),
    Remote(LocalAddress),
}

impl PagerArgs {
    /// The task of these flags.
    pub(super) fn task(self, env_level: Option<OsString>) -> Result<PagerTask, String> {
        let level = run::level(self.log, env_level)?;
        let clients = self.socket.map(Clients::Machine).or(self.serve.map(Clients::Pagers));
        let source = self.snapshot.map(Pages::Snapshot).or(self.from.map(Pages::Remote));
        let needed =
            "rvmm pager needs --socket PATH or --serve WHERE, and --snapshot DIR or --from WHERE";
        let (clients, source) = clients.zip(source).ok_or(needed)?;
        Ok(PagerTask { clients, source, level })
    }
}

impl PagerTask {
    /// Serves to the end, and returns the exit code.
    pub(super) fn perform(self) -> u8 {
        logging::start(self.level);
        match self.serve() {
            Ok(text) => output::show(&text),
            Err(error) => exit_code(Err(error)),
        }
    }

    fn serve(self) -> Result<String, Error> {
        match (self.clients, self.source) {
            (Clients::Machine(path), source) => {
                let contents = match source {
                    Pages::Snapshot(folder) => {
                        Contents::Snapshot(Box::new(Snapshot::open(&folder)?))
                    }
                    Pages::Remote(address) => Contents::Remote(address),
                };
                let ready = || {
                    output::print_message(&format!("Waiting for a machine at {}", path.display()));
                };
                let served = serve_machine(&path, contents, ready)?;
                Ok(format!(
                    "The machine has ended: {} pages filled, {} of them waited for\n",
                    served.pages, served.faults
                ))
            }
            (Clients::Pagers(address), Pages::Snapshot(folder)) => {
                let snapshot = Snapshot::open(&folder)?;
                let ready =
                    |place: &str| output::print_message(&format!("Serving pages at {place}"));
                match serve_pages(&address, snapshot, ready)? {}
            }
            (Clients::Pagers(_), Pages::Remote(_)) => {
                let what =
                    "Cannot use --serve together with --from: the pages would only be passed on";
                Err(Error::Config(what.into()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Task, task};
    use super::*;

    fn parse(flags: &str) -> Result<(Clients, Pages), String> {
        let args = ["rvmm", "pager"].into_iter().chain(flags.split_whitespace());
        match task(args.map(OsString::from), None)? {
            Task::Page(PagerTask { clients, source, .. }) => Ok((clients, source)),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_pager_has_one_side_with_clients_and_one_with_pages() {
        let port = LocalAddress::Tcp(([127, 0, 0, 1], 7).into());
        let (socket, folder) = (Clients::Machine("s".into()), Pages::Snapshot("d".into()));
        assert_eq!(parse("--socket s --snapshot d"), Ok((socket, folder)));
        let (socket, remote) = (Clients::Machine("s".into()), Pages::Remote(port.clone()));
        assert_eq!(parse("--socket s --from tcp:localhost:7"), Ok((socket, remote)));
        let (pagers, folder) = (Clients::Pagers(port), Pages::Snapshot("d".into()));
        assert_eq!(parse("--serve tcp:localhost:7 --snapshot d"), Ok((pagers, folder)));
        for flags in [
            "",
            "--socket s",
            "--snapshot d",
            "--serve unix:a --from unix:b",
            "--socket s --serve unix:a --snapshot d",
            "--socket s --snapshot d --from unix:b",
            "--socket s --from tcp:192.168.0.1:7",
            "--serve tcp:0.0.0.0:7 --snapshot d",
        ] {
            let line = parse(flags).unwrap_err();
            assert!(!line.contains('\n'), "{line}");
        }
    }
}
