//! How many execs are started at once.
//!
//! Running the OCI runtime takes a processor some milliseconds. Of hundreds at once, the last would not finish sooner than one after
//! the other, and every other request would wait for all of them.
use std::cell::OnceCell;
use std::future::Future;
use std::time::Duration;

use tokio::sync::Semaphore;

/// Admits some starts at once; the others wait for their turn in order of arrival.
#[derive(Debug)]
pub(super) struct Starts {
    /// Made by the first start: finding out how many processors there are takes a dozen files, and most containers have no execs.
    turns: OnceCell<Semaphore>,
    /// How long a start may occupy a turn.
    turn: Duration,
}

impl Starts {
    pub(super) fn new() -> Self {
        Self { turns: OnceCell::new(), turn: TURN }
    }

    fn turns(&self) -> &Semaphore {
        self.turns.get_or_init(|| {
            let processors = std::thread::available_parallelism().map_or(1, usize::from);
            Semaphore::new((2 * processors).clamp(AT_LEAST, AT_MOST))
        })
    }

    /// Does `work` in its turn. Work that takes longer than a turn gives it up and continues.
    pub(super) async fn in_turn<T>(&self, work: impl Future<Output = T>) -> T {
        let turn = self.turns().acquire().await;
        tokio::pin!(work);
        match tokio::time::timeout(self.turn, &mut work).await {
            Ok(result) => result,
            Err(_) => {
                drop(turn);
                work.await
            }
        }
    }
}

const AT_LEAST: usize = 4;
const AT_MOST: usize = 64;
const TURN: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::rc::Rc;

    use super::*;

    #[test]
    fn starts_that_hang_hold_up_no_other() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("it has what it needs");
        tokio::task::LocalSet::new().block_on(&runtime, async {
            let (starts, hanging) = (Rc::new(Starts { turn: Duration::from_millis(1), ..Starts::new() }), Rc::new(Cell::new(0)));
            for _ in 0..3 * AT_MOST {
                let (starts, hanging) = (Rc::clone(&starts), Rc::clone(&hanging));
                tokio::task::spawn_local(async move {
                    let hang = async {
                        hanging.set(hanging.get() + 1);
                        std::future::pending::<()>().await;
                    };
                    starts.in_turn(hang).await;
                });
            }
            for _ in 0..3 * AT_MOST {
                tokio::task::yield_now().await;
            }
            assert!((AT_LEAST..=AT_MOST).contains(&hanging.get()), "{} at once", hanging.get());
            assert_eq!(starts.in_turn(async { 7 }).await, 7);
            assert_eq!(hanging.get(), 3 * AT_MOST);
        });
    }
}
