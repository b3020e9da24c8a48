//! A run's folder and its report: self-contained HTML with curves, tables and settings.

mod chart;
mod crossing;
mod folder;
mod history;
mod page;

pub use crossing::Crossing;
pub use folder::{FolderError, Loaded, Row, RunFolder, RunWriter, Target, load};
pub use history::{History, Point};
pub use page::{Machine, RunReport, compare, render};
