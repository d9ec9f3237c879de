"""What papers propose: a folder a stage, a file a method, one public class a file."""
