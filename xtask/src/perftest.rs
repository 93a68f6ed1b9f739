//! What perftest prints, as numbers.

use anyhow::{Result, bail};

/// One line of a result table.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// The size of the messages.
    pub bytes: u64,
    /// How many of them (of all queue pairs together, in bandwidth tests).
    pub iterations: u64,
    /// The columns that follow.
    values: Vec<f64>,
}

impl Row {
    /// Average bandwidth in MiB/s, of a bandwidth test (peak, average, message rate).
    pub fn bandwidth(&self) -> Option<f64> {
        (self.values.len() == 3).then(|| self.values[1])
    }

    /// Typical latency in microseconds, of a latency test (minimum, maximum, typical, average, ...).
    pub fn latency(&self) -> Option<f64> {
        (self.values.len() == 7).then(|| self.values[2])
    }

    /// Whether the test measured anything. Two decimals of MiB/s may round a small message's bandwidth to nothing,
    /// the message rate beside it has six.
    pub fn has_figures(&self) -> bool {
        self.values.iter().any(|&value| value > 0.0)
    }
}

/// MiB in a gigabit.
const MIB_OF_GIGABIT: f64 = 1e9 / 8.0 / (1 << 20) as f64;

/// The rows of the result table, in the order in which they were printed.
pub fn rows(stdout: &str) -> Vec<Row> {
    let mut table = stdout.lines().skip_while(|line| !line.trim_start().starts_with("#bytes"));
    let is_in_gigabits = table.next().is_some_and(|head| head.contains("Gb/sec"));
    let mut rows: Vec<Row> = table.filter_map(row).collect();
    if is_in_gigabits {
        // Peak and average.
        let bandwidths = rows.iter_mut().flat_map(|row| row.values.iter_mut().take(2));
        bandwidths.for_each(|value| *value *= MIB_OF_GIGABIT);
    }
    rows
}

/// The only row of a test of one size.
pub fn single_row(stdout: &str) -> Result<Row> {
    match rows(stdout).as_slice() {
        [row] => Ok(row.clone()),
        other => bail!("expected one row of results, found {}:\n{stdout}", other.len()),
    }
}

fn row(line: &str) -> Option<Row> {
    let mut fields = line.split_whitespace();
    let bytes = fields.next()?.parse().ok()?;
    let iterations = fields.next()?.parse().ok()?;
    let values = fields.map(|field| field.parse().ok()).collect::<Option<Vec<f64>>>()?;
    Some(Row { bytes, iterations, values })
}

#[cfg(test)]
mod tests {
    use super::*;

    const BANDWIDTH: &str = "\
 remote address: LID 0000 QPN 0x0012 PSN 0x1 RKey 0x1 VAddr 0x2
---------------------------------------------------------------------------------------
 #bytes     #iterations    BW peak[MB/sec]    BW average[MB/sec]   MsgRate[Mpps]
 65536      1000             19881.07            19823.27		   0.317172
 131072     1000             20881.07            20823.27		   0.166586
---------------------------------------------------------------------------------------
";

    const LATENCY: &str = "\
 #bytes #iterations    t_min[usec]    t_max[usec]  t_typical[usec]    t_avg[usec]    t_stdev[usec]   99% percentile[usec]   99.9% percentile[usec]
 8       1000          1.80           9.96         1.91  	       1.95     	0.18   		2.30    		9.96
";

    #[test]
    fn gigabits_are_told_as_the_same_bandwidth() {
        let table = BANDWIDTH.replace("MB/sec", "Gb/sec").replace("19823.27", "166.29");
        let bandwidth = rows(&table)[0].bandwidth().unwrap();
        assert!((bandwidth - 19823.4).abs() < 1.0, "{bandwidth}");
    }

    #[test]
    fn a_bandwidth_table_is_read() {
        let rows = rows(BANDWIDTH);
        assert_eq!(rows.iter().map(|row| row.bytes).collect::<Vec<_>>(), [65536, 131_072]);
        assert_eq!((rows[0].iterations, rows[0].bandwidth()), (1000, Some(19823.27)));
        assert!(single_row(BANDWIDTH).is_err());
    }

    #[test]
    fn a_latency_table_is_read() {
        let row = single_row(LATENCY).unwrap();
        assert_eq!((row.bytes, row.latency(), row.bandwidth()), (8, Some(1.91), None));
        assert!(row.has_figures());
    }

    #[test]
    fn a_rate_alone_is_a_figure() {
        assert!(row("2 10 0.00 0.00 0.001292").unwrap().has_figures());
        assert!(!row("2 10 0.00 0.00 0.000000").unwrap().has_figures());
        assert!(!row("2 10").unwrap().has_figures());
    }

    #[test]
    fn lines_before_the_table_are_not_rows() {
        assert_eq!(rows("1 2 3\n"), []);
    }
}
