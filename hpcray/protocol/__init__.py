"""What travels between processes: ids, values, messages. Pure: no sockets, no clocks, no MPI."""
