//! Who will want what.
//!
//! Tasks announce their wants when they are spawned, under numbers that grow, and retract them when they
//! are planned or given up. So the store knows for each box which task wants it next, and what that
//! is farthest for goes first when room is needed.

use smallvec::SmallVec;

use super::State;

impl State {
    /// The task wants the box of the frame.
    pub(super) fn want(&mut self, number: u64, directory: u32, frame: u32) {
        let wanted = &mut self.directories[directory].frames[frame].wanted;
        let at = match wanted.back() {
            Some(&last) if last >= number => match wanted.binary_search(&number) {
                Ok(_) => return,
                Err(at) => at,
            },
            _ => wanted.len(),
        };
        if at == wanted.len() {
            wanted.push_back(number);
        } else {
            wanted.insert(at, number);
        }
        if at == 0 {
            self.rerank_frame(directory, frame);
        }
    }

    /// The task does not want it any more. It may never have.
    #[inline]
    pub(super) fn unwant(&mut self, number: u64, directory: u32, frame: u32) {
        let wanted = &mut self.directories[directory].frames[frame].wanted;
        let at = match wanted.front() {
            None => return,
            Some(&first) if first == number => 0,
            Some(_) => match wanted.binary_search(&number) {
                Ok(at) => at,
                Err(_) => return,
            },
        };
        if at == 0 {
            wanted.pop_front();
        } else {
            wanted.remove(at);
        }
        if at == 0 {
            self.rerank_frame(directory, frame);
        }
    }

    /// What wants the frame next is another one.
    fn rerank_frame(&mut self, directory: u32, frame: u32) {
        if !self.pressed {
            return;
        }
        let known = &self.directories[directory].frames;
        let own = known[frame].instances.iter().map(|(_, at)| *at);
        let neighbours = known[frame].neighbours.iter();
        let others = neighbours.flat_map(|other| known[*other].instances.iter().map(|(_, at)| *at));
        let all: SmallVec<[u32; 8]> = own.chain(others).collect();
        for at in all {
            self.rerank(at);
        }
    }
}
