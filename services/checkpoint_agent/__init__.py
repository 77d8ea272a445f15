"""The checkpoint agent: holds, dumps, and kills or thaws servers on its node, and reports its berths."""
