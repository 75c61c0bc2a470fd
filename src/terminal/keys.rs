//! The keys that rvmm handles on a terminal: a state machine that needs no terminal.

/// Prefix of rvmm's keys: Ctrl-A.
const ESCAPE: u8 = 0x01;

/// Shown once when a guest starts on a terminal.
pub(super) const HINT: &[u8] = b"rvmm: Ctrl-A h shows the keys\r\n";

/// Shown by Ctrl-A h.
pub(super) const HELP: &[u8] = b"\r\n\
    rvmm: Ctrl-A x       end the virtual machine\r\n\
    rvmm: Ctrl-A z       stop it and go back to the shell, whose fg continues it\r\n\
    rvmm: Ctrl-A Ctrl-A  send Ctrl-A to the guest\r\n\
    rvmm: Ctrl-A h       this help\r\n";

/// Filters rvmm's keys out of the input. Any other key after Ctrl-A is passed to the guest, without the Ctrl-A.
#[derive(Debug, Default)]
pub(super) struct Keys {
    escaped: bool,
}

/// A command of the user's to rvmm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    /// End the machine.
    Stop,
    /// Stop the process, as Ctrl-Z does on a terminal that is not raw.
    Suspend,
    /// Show the keys.
    Help,
}

impl Keys {
    /// Moves the guest's bytes to the front of `typed` and returns their number, and the last command among the others.
    /// The bytes after [`Command::Stop`] are ignored.
    pub(super) fn filter(&mut self, typed: &mut [u8]) -> (usize, Option<Command>) {
        let mut kept = 0;
        let mut command = None;
        for at in 0..typed.len() {
            let Some(&key) = typed.get(at) else { break };
            match self.step(key) {
                Step::Guest => {
                    if let Some(slot) = typed.get_mut(kept) {
                        *slot = key;
                    }
                    kept += 1;
                }
                Step::Nothing => {}
                Step::Command(Command::Stop) => return (kept, Some(Command::Stop)),
                Step::Command(other) => command = Some(other),
            }
        }
        (kept, command)
    }

    fn step(&mut self, key: u8) -> Step {
        if !self.escaped {
            self.escaped = key == ESCAPE;
            return if self.escaped { Step::Nothing } else { Step::Guest };
        }
        self.escaped = false;
        match key {
            b'x' | b'X' => Step::Command(Command::Stop),
            b'z' | b'Z' => Step::Command(Command::Suspend),
            b'h' | b'H' | b'?' => Step::Command(Command::Help),
            _ => Step::Guest,
        }
    }
}

enum Step {
    Guest,
    Nothing,
    Command(Command),
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The guest's bytes and rvmm's commands, if the keys arrive in these pieces.
    fn typed(pieces: &[&[u8]]) -> (Vec<u8>, Vec<Command>) {
        let mut keys = Keys::default();
        let (mut guest, mut commands) = (Vec::new(), Vec::new());
        for piece in pieces {
            let mut bytes = piece.to_vec();
            let (kept, command) = keys.filter(&mut bytes);
            guest.extend_from_slice(&bytes[..kept]);
            commands.extend(command);
        }
        (guest, commands)
    }

    #[test]
    fn ordinary_keys_go_to_the_guest_unchanged() {
        let all: Vec<u8> = (0..=255).filter(|key| *key != ESCAPE).collect();
        assert_eq!(typed(&[&all]), (all.clone(), vec![]));
    }

    #[test]
    fn ctrl_a_x_stops_and_nothing_after_it_reaches_the_guest() {
        assert_eq!(typed(&[b"ab\x01xcd"]), (b"ab".to_vec(), vec![Command::Stop]));
        assert_eq!(typed(&[b"\x01X"]), (vec![], vec![Command::Stop]));
    }

    #[test]
    fn ctrl_a_z_suspends_and_what_was_typed_behind_it_reaches_the_guest_later() {
        assert_eq!(typed(&[b"a\x01zb"]), (b"ab".to_vec(), vec![Command::Suspend]));
        assert_eq!(typed(&[b"\x01Z"]), (vec![], vec![Command::Suspend]));
    }

    #[test]
    fn ctrl_a_h_asks_for_help_and_the_rest_goes_on() {
        assert_eq!(typed(&[b"a\x01hb\x01?c"]), (b"abc".to_vec(), vec![Command::Help]));
    }

    #[test]
    fn ctrl_a_twice_sends_one_ctrl_a() {
        assert_eq!(typed(&[b"\x01\x01x"]), (b"\x01x".to_vec(), vec![]));
        assert_eq!(typed(&[b"\x01\x01\x01x"]), (b"\x01".to_vec(), vec![Command::Stop]));
    }

    #[test]
    fn another_key_after_ctrl_a_goes_to_the_guest() {
        assert_eq!(typed(&[b"\x01ls\x01\x03"]), (b"ls\x03".to_vec(), vec![]));
    }

    #[test]
    fn keys_may_arrive_one_by_one() {
        assert_eq!(typed(&[b"a", b"\x01", b"", b"x"]), (b"a".to_vec(), vec![Command::Stop]));
        assert_eq!(typed(&[b"\x01", b"\x01", b"x"]), (b"\x01x".to_vec(), vec![]));
    }
}
